"""Say in words what became of rows, and show a document as the model sees it."""

from collections.abc import Iterator
from itertools import groupby

from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import IGNORE
from src.data.dataset import Document, TokenDataset


def data_lines(dataset: TokenDataset) -> Iterator[str]:
    """Say how large a dataset is, how its rows were read or left out, and what was not read."""
    facts, tokens = dataset.facts, dataset.lengths.sum()
    share = f"of which {facts.labelled_tokens:,} labelled ({facts.labelled_tokens / tokens:.0%})"
    yield f"documents: {len(dataset):,}, tokens: {tokens:,}, {share}"
    yield "read " + ", ".join(f"{count:,} as {shape}" for shape, count in facts.read_as.items())
    for note, count in facts.notes.items():
        yield f"{count:,} {'row' if count == 1 else 'rows'} {note}"
    if facts.unread:
        yield f"not read: {', '.join(facts.unread)}"


def show_document(
    document: Document, tokenizer: Tokenizer, marks: tuple[str, str] = ("[", "]")
) -> str:
    """Return a document as the model sees it, with the tokens that carry loss between marks."""
    pairs = zip(document.input_ids.tolist(), document.labels.tolist(), strict=True)
    text = ""
    for labelled, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        part = str(tokenizer.decode([token for token, _ in group]))
        text += f"{marks[0]}{part}{marks[1]}" if labelled else part
    return text
