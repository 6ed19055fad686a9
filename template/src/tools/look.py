"""Describe a run's rows: shapes, lengths, labels, rows left out, duplicates, and examples."""

import json
from collections.abc import Iterator
from itertools import islice

import numpy as np

from src.config import Config
from src.data.dataset import TokenDataset, load_documents
from src.models.model import load_tokenizer
from src.training.report import data_lines, show_document

EXAMPLES = 3  # documents that are shown
REASONS = 5  # rows that were left out: the first ones, each with its reason


def look(config: Config, marks: tuple[str, str]) -> Iterator[str]:
    """Read and tokenise what training would; yield the lines of the page.

    Args:
        config: of the run.
        marks: what to print before and after tokens that carry loss.
    """
    tokenizer = load_tokenizer(config.model)
    train, evaluation = load_documents(config, tokenizer)
    yield from _describe("data.train", train)
    if evaluation is not None and evaluation is not train:  # with overfit it is the same
        yield from _describe("data.eval", evaluation)
        if both := np.isin(evaluation.hashes(), train.hashes()).sum():
            yield f"           documents that are in data.train too: {both:,}"
    for document in train[list(range(min(EXAMPLES, len(train))))]:
        yield f"\n--- document {document.row + 1}, {len(document.input_ids)} tokens"
        yield show_document(document, tokenizer, marks)


def _describe(name: str, dataset: TokenDataset) -> Iterator[str]:
    """Yield counts, notes, lengths and duplicates of a dataset, a line each."""
    lengths = dataset.lengths
    median, high = np.percentile(lengths, (50, 90)).astype(int)
    yield name
    for line in data_lines(dataset):
        yield f"           {line}"
    yield f"           lengths: median {median:,}, 90 % up to {high:,}, longest {lengths.max():,}"
    with dataset.left_out.open(encoding="utf-8") as file:
        for line in islice(file, REASONS):
            row = json.loads(line)
            yield f"             {row['place']}: {row['reason']}"
    if count := len(dataset) - len({*dataset.hashes()}):
        yield f"           documents that repeat another one: {count:,}"
