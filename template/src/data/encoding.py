"""A row becomes token ids and labels: what the assistant says carries loss, and nothing else."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import IGNORE, Rejected
from src.data.chat import Rendered, render, turn_ends
from src.data.rows import Row
from src.data.sources import reason_of


class Encoded(NamedTuple):
    """A row as tokens."""

    ids: list[int]
    labels: list[int]  # of the same length
    prompted: bool  # whether each answer follows all that the generation prompt writes


def encode(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[Encoded | Rejected]:
    """Yield token ids and labels of each row; only what the assistant says carries a label.

    The whole conversation is tokenised once, as one text, because tokens of pieces need not be
    the tokens of the whole. A token is labelled if it holds a part of an assistant's turn, the
    stop token that ends the turn included. Position 0 never is: nothing predicts it.

    Yields:
        One for each row; `Rejected` where the chat template cannot write it.
    """
    rendered = [_render(row, tokenizer) for row in rows]
    texts = [each.text for each in rendered if isinstance(each, Rendered)]
    # The template has written BOS and EOS already: a second BOS is the classic mistake.
    encoded = tokenizer(texts or [""], add_special_tokens=False, return_offsets_mapping=True)
    tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for row in rendered:
        if isinstance(row, Rejected):
            yield row
            continue
        ids, offsets = next(tokens)
        spoken = bytearray(len(row.text) + 1)  # 1 where a character is the assistant's
        for start, end in row.spans:
            spoken[start:end] = b"\1" * (end - start)
        # Also one that begins before: a blank of the template may merge with the answer's start.
        said = (1 in spoken[start:end] for start, end in offsets)
        labels = [i if each else IGNORE for i, each in zip(ids, said, strict=True)]
        labels[:1] = [IGNORE]
        yield Encoded(ids, labels, row.prompted)


def _render(row: Row, tokenizer: Tokenizer) -> Rendered | Rejected:
    """Return the row as one text, and the spans of its characters that carry loss."""
    if "text" in row:
        begin, end = str(tokenizer.bos_token or ""), str(tokenizer.eos_token)
        # As the tokenizer would; but never twice, where the row has them already.
        begin = begin if tokenizer("")["input_ids"] and not row["text"].startswith(begin) else ""
        text = begin + row["text"] + ("" if row["text"].endswith(end) else end)
        return Rendered(text, [(0, len(text))], prompted=True)
    try:
        return render(row["messages"], row.get("tools"), tokenizer)
    except (ValueError, RecursionError) as error:
        return Rejected(reason_of(error))


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's EOS and the template's end of turn.

    They often differ: Qwen's base tokenizers carry a chat template that closes turns with
    <|im_end|> while their EOS is <|endoftext|>, and a model trained so never stops.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        try:
            tokens = turn_ends(tokenizer, str(tokenizer.chat_template)).tokens
        except ValueError:
            return ids
        ids += [i for i in map(tokenizer.convert_tokens_to_ids, tokens) if i not in ids]
    return ids
