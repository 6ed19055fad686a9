"""Labels are what the assistant says, and what is asked is the prompt that training saw."""

import pytest

from conftest import CALL, TOOL, chat, turn
from src.config import DataConfig
from src.data import IGNORE
from src.data.answers import read_question
from src.data.chat import chat_text
from src.data.encoding import encode, render_row, stop_token_ids
from src.data.rows import read_rows

ASKED, SAID = turn("user", "Which one?"), turn("assistant", "The first.")
CALLED = turn("assistant", tool_calls=[CALL])


def encoded(tokenizer, row: dict) -> tuple[list[int], list[int]]:
    (tokens,) = encode([render_row(row, tokenizer)], tokenizer)
    return tokens["input_ids"].tolist(), tokens["labels"].tolist()


def labelled_text(tokenizer, row: dict) -> str:
    ids, labels = encoded(tokenizer, row)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORE])


WRITTEN = '<tool_call>\n{"name": "look", "arguments": {"at": "home"}}\n</tool_call><|end|>'


# Every shape under many templates is tested where this project was made from.
@pytest.mark.parametrize(
    ("row", "labelled"),
    [
        ({"messages": [turn("system", "Be brief."), ASKED, SAID, ASKED, SAID]}, "The first.<|end|>The first.<|end|>"),
        ({"prompt": "Which one?", "completion": "The first.", "system": "Be brief."}, "The first.<|end|>"),
        ({"instruction": "Which one?", "input": "Of the two.", "output": "The first."}, "The first.<|end|>"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "Ho<|end|>"),
        ({"messages": [SAID, ASKED, SAID]}, "The first.<|end|>The first.<|end|>"),
        ({"messages": [ASKED, {**SAID, "weight": 0}, ASKED, {**SAID, "train": False}, ASKED, SAID]}, "The first.<|end|>"),
        ({"messages": [ASKED, CALLED, turn("tool", "At home."), SAID], "tools": [TOOL]}, f"{WRITTEN}The first.<|end|>"),
    ],
)  # fmt: skip
def test_only_the_assistant_and_its_stop_token_carry_loss(
    tokenizer, write_rows, row: dict, labelled: str
) -> None:
    data = DataConfig(train="-")
    (read,) = read_rows(write_rows(row), data)
    assert labelled_text(tokenizer, read) == labelled
    ids, labels = encoded(tokenizer, read)
    asked = read_question(row, data)
    prompt = chat_text(tokenizer, asked["messages"], True, asked["tools"])
    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert render_row(read, tokenizer).prompted
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt)] != IGNORE == labels[len(prompt) - 1]
    assert ids.count(tokenizer.bos_token_id) == 1  # the template's: this tokenizer adds none


def test_text_rows_carry_loss_everywhere_and_end_once_with_the_stop_token(tokenizer) -> None:
    for text in ("Once upon", "Once upon<|end|>"):
        ids, labels = encoded(tokenizer, {"text": text})
        assert tokenizer.decode(ids) == "Once upon<|end|>"
        assert labels == [IGNORE, *ids[1:]], "nothing predicts the first token"


def test_generation_stops_where_the_template_ends_a_turn(speak) -> None:
    tokenizer = speak(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert stop_token_ids(tokenizer) == [
        tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]  # fmt: skip
    assert labelled_text(tokenizer, chat("q", "a")).strip() == "a<|im_end|>"
