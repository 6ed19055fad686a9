"""A row becomes token ids and labels: what the assistant says carries loss, and nothing else."""

from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import IGNORE
from src.data.chat import Span, render, turn_ends
from src.data.rows import Row
from src.utils.errors import UserError


def encode(
    rows: list[Row], tokenizer: Tokenizer, first_row: int = 1, source: str = "rows"
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
            text, turns = _render(row, tokenizer)
        except ValueError as error:
            raise UserError(f"{source}: row {number}: {error}") from None
        texts.append(text)
        spans.append(turns)
    # The template has written BOS and EOS already: a second BOS is the classic mistake.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )
    result = []
    for text, turns, ids, offsets in zip(
        texts, spans, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        spoken = bytearray(len(text) + 1)  # 1 where a character is the assistant's
        for start, end in turns:
            spoken[start:end] = b"\1" * (end - start)
        labels = [i if spoken[at] else IGNORE for i, (at, _) in zip(ids, offsets, strict=True)]
        labels[:1] = [IGNORE]
        result.append((ids, labels))
    return result


def _render(row: Row, tokenizer: Tokenizer) -> tuple[str, list[Span]]:
    """The row as one text, and the (start, end) character spans that carry loss."""
    if "text" in row:
        prefix = tokenizer.bos_token if tokenizer("")["input_ids"] else ""
        text = (prefix or "") + row["text"] + tokenizer.eos_token
        return text, [(0, len(text))]
    text, spans, _ = render(row["messages"], row.get("tools"), tokenizer)
    return text, spans


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's EOS and the template's end of turn.

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
