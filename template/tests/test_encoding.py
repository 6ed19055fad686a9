"""Tokens and labels of a row are what the loss believes they are."""

import pytest
from transformers import AutoTokenizer

from conftest import ROOT
from src.data import IGNORE
from src.data.encoding import encode, stop_token_ids

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chatml():
    """A tokenizer whose template closes turns with a token that is not its EOS, as Qwen's."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def labelled_text(tokenizer, row: dict) -> str:
    ((ids, labels, _),) = encode([row], tokenizer)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORE])


TWO_TURNS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "First answer."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Second answer."},
    ]
}


def test_only_the_assistant_and_its_stop_token_carry_loss(tokenizer) -> None:
    assert labelled_text(tokenizer, TWO_TURNS) == "First answer.<|end|>Second answer.<|end|>"


def test_a_template_without_generation_marks_is_masked_by_its_turns(chatml) -> None:
    assert labelled_text(chatml, TWO_TURNS) == "First answer.<|im_end|>Second answer.<|im_end|>"


def test_a_template_that_leaves_turns_out_is_refused(chatml) -> None:
    chatml.chat_template = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (rejected,) = encode([TWO_TURNS], chatml)
    assert str(rejected) == "the chat template leaves out message 3"


def test_text_rows_carry_loss_everywhere_and_end_with_the_stop_token(tokenizer) -> None:
    ((ids, labels, _),) = encode([{"text": "Once upon"}], tokenizer)
    assert tokenizer.decode(ids) == "Once upon<|end|>"
    assert labels == [IGNORE, *ids[1:]], "nothing predicts the first token"


def test_there_is_exactly_one_bos(tokenizer) -> None:
    for row in (TWO_TURNS, {"text": "Once"}):
        ((ids, _, _),) = encode([row], tokenizer)
        # This tokenizer adds none by itself; its template writes one.
        assert ids.count(tokenizer.bos_token_id) == ("messages" in row)


def test_what_generation_is_given_is_a_prefix_of_what_was_trained(tokenizer) -> None:
    messages = TWO_TURNS["messages"]
    ((ids, labels, _),) = encode([{"messages": messages[:3]}], tokenizer)
    prompt = tokenizer.apply_chat_template(
        messages[:2], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt)] != IGNORE == labels[len(prompt) - 1]


def test_generation_stops_where_the_template_ends_a_turn(chatml, tokenizer) -> None:
    ids = stop_token_ids(chatml)
    assert ids == [chatml.eos_token_id, chatml.convert_tokens_to_ids("<|im_end|>")]
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
