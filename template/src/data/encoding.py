"""A row becomes token ids and labels: what the assistant says carries loss, and nothing else."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import IGNORE
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


def _render(row: Row, tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
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
    messages: list[dict], tokenizer: Tokenizer
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


def chat_text(tokenizer: Tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    """The conversation as the chat template writes it."""
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def stop_token_ids(tokenizer: Tokenizer) -> list[int]:
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
