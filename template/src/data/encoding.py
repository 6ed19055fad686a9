"""A row becomes token ids and labels: what the assistant says carries loss, and nothing else."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import IGNORE, Rejected
from src.data.chat import Rendered, render, turn_format
from src.data.rows import Row

TOKEN = np.dtype([("input_ids", np.int32), ("labels", np.int32)])


def render_row(row: Row, tokenizer: Tokenizer) -> Rendered:
    """Return a row as one text, and the spans of its characters that carry loss.

    Raises:
        Rejected: as `render`.
    """
    if "text" not in row:
        return render(row["messages"], row.get("tools"), tokenizer)
    # As the tokenizer would; but never twice, where the row has them already.
    begin = str(tokenizer.bos_token or "") if tokenizer("")["input_ids"] else ""
    end = str(tokenizer.eos_token)
    text = begin + row["text"].removeprefix(begin).removesuffix(end) + end
    return Rendered(text, [(0, len(text))], prompted=True)


def encode(rows: Sequence[Rendered], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yield each row as an array of TOKEN; only what the assistant says carries a label.

    The whole conversation is tokenised once, as one text, because tokens of pieces need not be
    the tokens of the whole. A token is labelled if it holds a part of an assistant's turn, the
    stop token that ends the turn included. Position 0 never is: nothing predicts it.
    """
    # The template has written BOS and EOS already: a second BOS is the classic mistake.
    texts = [row.text for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    tokenised = zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for row, ids, offsets in tokenised:
        spoken = bytearray(len(row.text) + 1)  # 1 where a character is the assistant's
        for start, end in row.spans:
            spoken[start:end] = b"\1" * (end - start)
        # Also one that begins before: a blank of the template may merge with the answer's start.
        said = [1 in spoken[start:end] for start, end in offsets]
        tokens = np.empty(len(ids), TOKEN)
        tokens["input_ids"], tokens["labels"] = ids, np.where(said, ids, IGNORE)
        tokens["labels"][:1] = IGNORE
        yield tokens


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's EOS and the template's end of turn.

    They often differ: Qwen's base tokenizers carry a chat template that closes turns with
    <|im_end|> while their EOS is <|endoftext|>, and a model trained so never stops.
    """
    tokens = [tokenizer.eos_token] if tokenizer.eos_token else []
    with suppress(Rejected):  # a model without a chat template, or with one that refuses
        tokens += turn_format(tokenizer, str(tokenizer.chat_template)).end_tokens
    ids: Any = tokenizer.convert_tokens_to_ids([*dict.fromkeys(tokens)])
    return ids
