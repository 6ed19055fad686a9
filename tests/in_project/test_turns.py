"""Conversations that templates write in unusual ways, and long ones."""

import pytest

from conftest import CALL, turn
from test_chat import CALLS, OPEN, PREFILLS, THINKS, assistant, said, user


def test_a_users_turn_may_be_changed_as_it_carries_no_loss(speak) -> None:
    quotes = "(m.content | tojson if m.role == 'user' else m.content)"
    tokenizer = speak(OPEN.replace("m.content | trim", quotes))
    assert said(tokenizer, user('say "hi"'), assistant("hi")) == ["hi<|user|>"]


def test_a_conversation_is_rendered_a_few_times_however_many_turns_it_has(
    speak, monkeypatch
) -> None:
    tokenizer, renderings = speak(THINKS), []
    real = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: renderings.append(1) or real(*a, **k)
    )
    rounds = []
    for number in range(100):
        rounds += [CALLS[1], turn("tool", f"It is {number}." if number % 2 else "")]
    said(tokenizer, user("?"), assistant("!"))
    renderings.clear()
    called = said(tokenizer, user("When?"), *rounds, assistant("Late."))
    assert called[:-1] == ['<tool_call>look {"at": "home"}</tool_call><|im_end|>'] * 100
    assert len(renderings) <= 4, "what was 5 s for 400 calls"


@pytest.mark.parametrize("template", [THINKS, PREFILLS])
@pytest.mark.parametrize("weight", [0, 1])
def test_a_header_is_not_labelled_after_a_call_that_has_no_result_or_does_not_train(
    speak, template: str, weight: int
) -> None:
    # As the last turn of a shorter conversation the call would have an empty <think> before it.
    called = assistant("", tool_calls=[CALL], weight=weight)
    spans = said(speak(template), user("?"), called, assistant("It."), user("!"))
    assert spans[weight:] == ["It.<|im_end|>"]
