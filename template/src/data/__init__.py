"""Rows of files or the hub become batches: rows → encoding → dataset → batching."""

IGNORE = -100  # the label that carries no loss: torch's and transformers' convention


class Rejected(ValueError):
    """A row that cannot be used, and why.

    Attributes:
        empty: the row is well formed, but there is nothing to learn from it.
    """

    def __init__(self, reason: str, empty: bool = False) -> None:
        self.empty = empty
        super().__init__(reason)
