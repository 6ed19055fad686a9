"""Rows become tokens and labels, once, in an Arrow file that later runs reuse."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import batched
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from src.data import IGNORE
from src.data.rows import Row, is_file, read_rows
from src.utils.environment import from_root
from src.utils.errors import UserError

FORMAT = 1  # raise it when the code below makes other tokens of the same rows
ROWS_AT_ONCE = 1000  # the tokenizer runs a list of texts in parallel
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "labelled": Value("int32"),  # how many labels carry loss
        "length": Value("int32"),  # before truncation
    }
)


class TokenDataset:
    """Documents as tokens, memory-mapped: a million rows cost no more memory than a thousand.

    Attributes:
        lengths: tokens of each document after truncation, shape (documents,).
        truncated: how many documents were cut at `max_length`.
        dropped: how many had no label left after that; they are not part of the dataset.
        labelled_tokens: labels that carry loss, over all documents.
        fingerprint: a hash of the rows, the tokenizer, the template and `max_length`.
    """

    def __init__(self, table: Dataset, max_length: int, fingerprint: str) -> None:
        original = np.asarray(table.data.column("length"))
        labelled = np.asarray(table.data.column("labelled"))
        kept = np.flatnonzero(labelled > 0)
        self._rows = kept
        self._table = table.with_format("numpy", columns=["input_ids", "labels"])
        self.lengths = np.minimum(original, max_length)[kept]
        self.truncated = int((original > max_length).sum())
        self.dropped = len(table) - len(kept)
        self.labelled_tokens = int(labelled.sum())
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def documents(self, indices: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The (input_ids, labels) of these documents, each of shape (length,)."""
        if not indices:
            return []
        rows = self._table[self._rows[indices]]
        return list(zip(rows["input_ids"], rows["labels"], strict=True))


def load_tokens(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limit: int | None = None,
) -> TokenDataset:
    """Read, check and tokenise a file or a hub dataset, or reuse what an earlier run made.

    The cache lies in the datasets cache under HF_HOME; its key is a hash of everything that
    the tokens depend on, so an edited file or template is tokenised anew.

    Args:
        source: `data.train` or `data.eval`.
        tokenizer: a fast tokenizer with a chat template.
        max_length: documents are cut after so many tokens.
        limit: use the first so many rows only.

    Raises:
        UserError: rows that cannot be used, or none from which anything can be learnt.
    """
    fingerprint = _fingerprint(source, tokenizer, max_length, limit)
    disable_progress_bars()
    try:
        table = Dataset.from_generator(
            _tokenise,
            features=FEATURES,
            gen_kwargs={
                "source": source,
                "tokenizer": tokenizer,
                "max_length": max_length,
                "limit": limit,
            },
            fingerprint=fingerprint,
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    dataset = TokenDataset(table, max_length, fingerprint)
    if len(dataset) == 0:
        raise UserError(
            f"{source}: nothing to learn from: in all {len(table)} rows the first "
            f"{max_length} tokens hold no assistant text; raise data.max_length"
        )
    return dataset


def _fingerprint(
    source: str, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None
) -> str:
    digest = hashlib.sha256()
    if is_file(source):
        with from_root(source).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        from datasets import load_dataset

        name, _, split = source.partition(":")
        digest.update(load_dataset(name, split=split or "train")._fingerprint.encode())
    backend = tokenizer.backend_tokenizer.to_str()
    for part in (backend, tokenizer.chat_template, max_length, limit, FORMAT):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def _tokenise(
    source: str, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None
) -> Iterator[dict[str, Any]]:
    for number, rows in enumerate(batched(_first(read_rows(source), limit), ROWS_AT_ONCE)):
        encoded = encode(list(rows), tokenizer, first_row=number * ROWS_AT_ONCE + 1, source=source)
        for ids, labels in encoded:
            cut = labels[:max_length]
            yield {
                "input_ids": ids[:max_length],
                "labels": cut,
                "labelled": sum(label != IGNORE for label in cut),
                "length": len(ids),
            }


def _first(rows: Iterator[Row], limit: int | None) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if limit is None or number < limit:
            yield row
        else:
            return


def encode(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    first_row: int = 1,
    source: str = "rows",
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each row; only what the assistant says carries a label.

    The whole conversation is tokenised once, as one text, because tokens of pieces need not be
    the tokens of the whole. A token is labelled if it begins inside an assistant's turn, the
    stop token that ends the turn included. Position 0 never is: nothing predicts it.

    Returns:
        Per row (input_ids, labels), two lists of equal length.
    """
    texts, spans = [], []
    for number, row in enumerate(rows, first_row):
        try:
            text, span = _render(row, tokenizer)
        except ValueError as error:
            raise UserError(f"{source}: row {number}: {error}") from None
        texts.append(text)
        spans.append(span)
    # The template has written BOS and EOS already: a second BOS is the classic mistake.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )
    result = []
    for ids, offsets, span in zip(
        encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
    ):
        labels = [IGNORE] * len(ids)
        turns = iter(span)
        start, end = next(turns, (0, 0))
        for i, (token_start, _) in enumerate(offsets):
            while token_start >= end and (following := next(turns, None)):
                start, end = following
            if start <= token_start < end:
                labels[i] = ids[i]
        labels[:1] = [IGNORE]
        result.append((ids, labels))
    return result


def _render(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The row as one text, and the (start, end) character spans that carry loss."""
    if "text" in row:
        prefix = tokenizer.bos_token if tokenizer("")["input_ids"] else ""
        text = (prefix or "") + row["text"] + tokenizer.eos_token
        return text, [(0, len(text))]
    messages = row["messages"]
    template = str(tokenizer.chat_template)
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        from transformers.utils.chat_template_utils import render_jinja_template

        # The template's author marks what the assistant says; only this function tells where.
        options: dict[str, Any] = dict(tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **options
        )
        texts, spans = rendered
        return texts[0], spans[0]
    return _render_by_prefix(messages, tokenizer)


def _render_by_prefix(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Find each assistant's turn as what it adds to the rendering of the turns before it."""

    def text_of(count: int, prompt: bool) -> str:
        return chat_text(tokenizer, messages[:count], prompt)

    whole, spans = text_of(len(messages), prompt=False), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = text_of(number, prompt=True), text_of(number + 1, prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            # Templates that cut earlier reasoning, for example.
            raise ValueError(
                f"the chat template rewrites message {number + 1} when others follow, so what "
                "the assistant said cannot be found in it; set model.chat_template to a "
                "template that marks it with {% generation %}"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], add_generation_prompt: bool
) -> str:
    """The conversation as the chat template writes it."""
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and the template's end of turn.

    They often differ: Qwen's base tokenizers carry a chat template that closes turns with
    <|im_end|> while their EOS is <|endoftext|>, and a model trained so never stops.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        word = "answer"
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": word}]
        text = chat_text(tokenizer, messages, add_generation_prompt=False)
        after = tokenizer(text.rpartition(word)[2], add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        if after and after[0] in special and after[0] not in ids:
            ids.append(after[0])
    return ids
