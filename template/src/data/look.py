"""What is in a dataset, in words: shapes, lengths, what is left out, duplicates, examples."""

import json
from collections.abc import Iterator
from itertools import islice

import numpy as np

from src.config import DataConfig
from src.data.dataset import TokenDataset
from src.data.describe import data_notes
from src.data.duplicates import repeated, shared

REASONS = 5  # of rows that were left out: the first ones
GREEN = ("\033[32m", "\033[0m")


def describe_data(
    name: str, dataset: TokenDataset, data: DataConfig, other: TokenDataset | None = None
) -> Iterator[str]:
    """Counts, lengths and duplicates of a dataset, a line each.

    Args:
        name: `data.train` or `data.eval`.
        dataset: its tokens.
        data: how they were made.
        other: where rows of this one should not be.
    """
    lengths, facts = dataset.lengths, dataset.facts
    shapes = ", ".join(f"{n:,} as {shape}" for shape, n in facts.read_as.items())
    tokens, labelled = int(lengths.sum()), facts.labelled_tokens
    median, high = np.percentile(lengths, (50, 90)).astype(int)
    yield f"{name:<10} {len(dataset):,} documents, read {shapes}"
    yield f"tokens     {tokens:,}, of which {labelled:,} labelled ({labelled / tokens:.0%})"
    yield f"lengths    median {median:,}, 90 % up to {high:,}, longest {lengths.max():,}"
    yield from (f"           {note}" for note in data_notes(facts, data))
    with dataset.left_out.open(encoding="utf-8") as file:
        for line in islice(file, REASONS):
            left = json.loads(line)
            yield f"             {left['place']}: {left['reason']}"
    if again := repeated(dataset):
        yield f"           {again:,} documents repeat another one"
    if other is not None and (both := shared(dataset, other)):
        yield f"           {both:,} documents are in data.train too"
