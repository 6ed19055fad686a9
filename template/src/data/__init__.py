"""Rows of files or the hub become batches: rows → encoding → dataset → batching."""

IGNORE = -100  # the label that carries no loss: torch's and transformers' convention
EMPTY = "left out: nothing to learn from"
UNUSABLE = "left out as unusable (see left_out.jsonl of a run)"


class Rejected(ValueError):
    """A row that is left out, and why.

    Attributes:
        count_as: what rows that are left out for the same reason are counted as.
    """

    def __init__(self, reason: str, count_as: str = UNUSABLE) -> None:
        self.count_as = count_as
        super().__init__(reason)
