"""What the assistant said is found in any template's text, and nothing else is."""

import pytest
from transformers import AutoTokenizer

from conftest import ROOT
from src.data import Rejected
from src.data.chat import chat_text, render
from src.data.encoding import stop_token_ids

# As Qwen 3 does: reasoning of the last turn only, and an empty one where there is none.
THINKS = (
    "{% for m in messages %}{% set c = m.content %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set c = c.split('</think>')[-1].lstrip() %}"
    "{% if loop.last %}<think>\n{{ m.reasoning_content or m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ c }}{% for t in m.tool_calls or [] %}<tool_call>{{ t.function.name }} {{ t.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREFILLS = THINKS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# As GLM does: a turn ends where the next one begins.
OPEN = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As DeepSeek does: arguments of tools are text.
TEXTUAL = OPEN.replace(
    "{% endfor %}",
    "{% for t in m.tool_calls or [] %}{{ t.function.name + t.function.arguments }}{% endfor %}{% endfor %}",
    1,
)
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|system|>",
]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def speak():
    """A tokenizer with another chat template: `speak(template)`."""

    def make(template: str):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "configs/tiny")
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.chat_template = template
        return tokenizer

    return make


def said(tokenizer, *messages: dict, tools=None) -> list[str]:
    text, spans, _ = render(list(messages), tools, tokenizer)
    return [text[start:end] for start, end in spans]


REASONED = [
    user("One?"), assistant("<think>\nOf one.\n</think>\n\nIt is one."),
    user("Two?"), assistant("<think>\nOf two.\n</think>\n\nIt is two."),
]  # fmt: skip


def test_reasoning_is_labelled_where_it_stands_in_the_text(speak) -> None:
    one, two = said(speak(THINKS), *REASONED)
    assert one == "It is one.<|im_end|>", "this template drops earlier reasoning"
    assert two == "<think>\nOf two.\n</think>\n\nIt is two.<|im_end|>"


def test_what_the_generation_prompt_writes_is_not_labelled(speak) -> None:
    tokenizer = speak(PREFILLS)
    assert said(tokenizer, *REASONED)[1] == "Of two.\n</think>\n\nIt is two.<|im_end|>"
    text, spans, prompted = render(REASONED, None, tokenizer)
    assert not prompted, "the first answer has no reasoning, which the prompt begins"
    prompt = chat_text(tokenizer, REASONED[:3], add_generation_prompt=True)
    assert render(REASONED[2:], None, tokenizer).prompted
    assert text[: spans[1][0]].endswith(prompt[prompt.index("Two?") :])


def test_a_turn_that_ends_with_the_next_ones_token_gets_it(speak) -> None:
    tokenizer = speak(OPEN)
    one, two = said(
        tokenizer, user("One?"), assistant(" It is one. "), user("Two?"), assistant("Two.")
    )
    assert (one, two) == ("It is one.<|user|>", "Two.<|user|>")
    assert tokenizer.convert_tokens_to_ids("<|user|>") in stop_token_ids(tokenizer)


@pytest.mark.parametrize("arguments", [{"at": "noon"}, '{"at": "noon"}'])
@pytest.mark.parametrize(
    ("template", "end"), [(THINKS, "</tool_call><|im_end|>"), (TEXTUAL, "<|tool|>")]
)
def test_calls_of_tools_are_labelled_and_their_results_are_not(
    speak, arguments, template, end
) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    turns = [user("When?"), assistant("", tool_calls=[call])]
    turns += [{"role": "tool", "content": "It is late."}, assistant("Late.")]
    called, answered = said(speak(template), *turns)
    assert called.endswith('{"at": "noon"}' + end)
    assert answered.startswith(("Late.", "<think>\n\n</think>\n\nLate."))
    assert "It is late" not in called + answered


def test_arguments_that_are_no_json_are_shown_as_they_are_or_refused_in_words(speak) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": "{noon"}}
    turns = [user("When?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "x"}]
    assert said(speak(TEXTUAL), *turns)[0].startswith("look{noon")
    with pytest.raises(ValueError, match=r"the chat template refuses it: .*no system"):
        chat_text(speak("{{ raise_exception('no system') }}"), turns[:1], True)


def test_calls_that_a_template_leaves_out_are_refused(speak) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    with pytest.raises(Rejected, match="leaves out the tool calls of message 2"):
        said(
            speak(OPEN),
            user("?"),
            assistant("", tool_calls=[call]),
            {"role": "tool", "content": "x"},
        )


def test_what_a_template_changes_is_refused(speak) -> None:
    shouts = OPEN.replace("m.content | trim", "m.content | upper")
    with pytest.raises(Rejected, match="leaves out or changes what the assistant says"):
        said(speak(shouts), user("1"), assistant("loud"))
    # A user's turn may be changed: it carries no loss.
    quotes = OPEN.replace(
        "m.content | trim", "(m.content | tojson if m.role == 'user' else m.content)"
    )
    assert said(speak(quotes), user('say "hi"'), assistant("hi")) == ["hi<|user|>"]
    with pytest.raises(ValueError, match="refuses it: no system"):
        said(speak("{{ raise_exception('no system') }}"), user("?"))


def test_a_conversation_is_rendered_a_few_times_however_many_turns_it_has(
    speak, monkeypatch
) -> None:
    tokenizer, renderings = speak(THINKS), []
    real = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: renderings.append(1) or real(*a, **k)
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "noon"}}}
    rounds = [
        message
        for number in range(100)
        for message in (
            assistant("", tool_calls=[call]),
            {"role": "tool", "content": f"It is {number}." if number % 2 else ""},
        )
    ]
    said(tokenizer, user("?"), assistant("!"))
    renderings.clear()
    called = said(tokenizer, user("When?"), *rounds, assistant("Late."))
    assert called[:-1] == ['<tool_call>look {"at": "noon"}</tool_call><|im_end|>'] * 100
    assert len(renderings) <= 4, "what was 5 s for 400 calls"


def test_a_header_is_not_labelled_after_a_call_that_has_no_result_or_does_not_train(speak) -> None:
    # As the last turn of a shorter conversation the call would have an empty <think> before it.
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    for template in (THINKS, PREFILLS):
        for weight in (0, 1):
            called = assistant("", tool_calls=[call], weight=weight)
            spans = said(speak(template), user("?"), called, assistant("It."), user("!"))
            assert spans[-1] == "It.<|im_end|>"
            assert len(spans) == 1 + weight
