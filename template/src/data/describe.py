"""Say in words what became of rows, and show a document as the model sees it."""

from collections.abc import Iterator
from itertools import groupby

from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import DataConfig
from src.data import IGNORE
from src.data.dataset import Document, Facts


def data_notes(facts: Facts, data: DataConfig) -> Iterator[str]:
    """Say how many rows were changed, left out or suspicious, a line for each reason."""
    too_long = f"longer than data.max_length={data.max_length}"
    cut = "cut" if data.too_long == "cut" else "left out"
    for count, text in (
        (facts.truncated, f"{cut}: {too_long}"),
        (facts.split, f"split: texts {too_long}"),
        (facts.dropped, "left out: nothing labelled remains of them"),
        (facts.empty, "left out: nothing to learn from"),
        (facts.unusable, "left out as unusable: left_out.jsonl says why"),
        (facts.typed, "hold a token of the chat template as text: it ends or opens a turn there"),
        (facts.missing_tools, "list tools, which the chat template does not print"),
        (facts.unprompted, "answer without what the generation prompt ends with, e.g. <think>"),
    ):
        if count:
            yield f"{count:,} rows {text}"
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
