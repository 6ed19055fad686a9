"""What is in a dataset, in words: shapes, lengths, what is left out, duplicates, examples."""

import hashlib
import json
from collections.abc import Iterator
from itertools import groupby, islice

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import DataConfig
from src.data import IGNORE
from src.data.dataset import Document, Facts, TokenDataset

REASONS = 5  # of rows that were left out: the first ones
AT_ONCE = 1000  # documents that are read together
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


def repeated(dataset: TokenDataset) -> int:
    """How many documents have the same tokens as an earlier one."""
    return len(dataset) - len(np.unique(_hashes(dataset)))


def shared(dataset: TokenDataset, other: TokenDataset) -> int:
    """How many documents of one have the same tokens as one of the other."""
    return int(np.isin(_hashes(dataset), _hashes(other)).sum())


def data_notes(facts: Facts, data: DataConfig) -> Iterator[str]:
    """What became of rows that are not simply trained on, a line each."""
    length, cut = data.max_length, "cut" if data.too_long == "cut" else "left out"
    for count, what in (
        (facts.truncated, f"{cut}: longer than data.max_length={length}"),
        (facts.split, f"split: texts longer than data.max_length={length}"),
        (facts.dropped, "left out: nothing labelled remains of them"),
        (facts.empty, "left out: nothing to learn from"),
        (facts.unusable, "left out as unusable: left_out.jsonl says why"),
        (facts.typed, "hold a token of the chat template as text: it ends or opens a turn there"),
        (facts.toolless, "have tools that the chat template does not write"),
        (facts.unprompted, "answer without what the generation prompt ends with, e.g. <think>"),
    ):
        if count:
            yield f"{count:,} rows {what}"
    if facts.unread:
        yield f"not read: {', '.join(facts.unread)}"


def show_document(
    document: Document, tokenizer: Tokenizer, marks: tuple[str, str] = ("[", "]")
) -> str:
    """A document as the model sees it, what carries loss between marks."""
    pairs = zip(document.input_ids.tolist(), document.labels.tolist(), strict=True)
    shown = ""
    for labelled, run_of in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        text = str(tokenizer.decode([token for token, _ in run_of]))
        shown += f"{marks[0]}{text}{marks[1]}" if labelled else text
    return shown


def _hashes(dataset: TokenDataset) -> np.ndarray:
    """64 bits for each document: equal ones for equal tokens; shape (documents,)."""
    found = np.empty(len(dataset), np.uint64)
    for start in range(0, len(dataset), AT_ONCE):
        for row, ids, _ in dataset[list(range(start, min(start + AT_ONCE, len(dataset))))]:
            digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
            found[row] = int.from_bytes(digest)
    return found
