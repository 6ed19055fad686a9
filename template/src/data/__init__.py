"""Rows on disk become token-budget batches."""

IGNORE = -100  # the label that carries no loss: torch's and transformers' convention
