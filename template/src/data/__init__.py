"""Rows of files or the hub become batches: rows → encoding → dataset → batching."""

IGNORE = -100  # the label that carries no loss: torch's and transformers' convention
