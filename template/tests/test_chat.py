"""What the assistant said is found in any template's text, and nothing else is."""

import json

import pytest

from conftest import CALL, TOOL, turn
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


def user(text: str) -> dict:
    return turn("user", text)


def assistant(text: str, **more) -> dict:
    return turn("assistant", text, **more)


CALLS = [user("When?"), assistant("", tool_calls=[CALL]), turn("tool", "It is late.")]


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


@pytest.mark.parametrize(
    ("template", "end"), [(THINKS, "</tool_call><|im_end|>"), (TEXTUAL, "<|tool|>")]
)
def test_calls_of_tools_are_labelled_and_their_results_are_not(speak, template, end) -> None:
    called, answered = said(speak(template), *CALLS, assistant("Late."))
    assert called.endswith('{"at": "home"}' + end)
    assert answered.startswith(("Late.", "<think>\n\n</think>\n\nLate."))
    assert "It is late" not in called + answered


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (OPEN, CALLS, "leaves out the calls of message 2"),
        (OPEN.replace("content | trim", "content | upper"), [user("1"), assistant("loud")],
         "leaves out or changes what the assistant says"),
        ("{{ raise_exception('no system') }}", [user("?")], "refuses it: TemplateError: no system"),
        (THINKS.replace("<|im_start|>{{", "{% if loop.last or m.role != 'assistant' %}{{").replace(
            "{{ c }}", "{{ c }}{% endif %}"), [user("1"), assistant("a"), user("2"), assistant("b")],
         "leaves out message 2"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_changes_or_refuses_is_rejected(
    speak, template: str, messages: list[dict], reason: str
) -> None:
    with pytest.raises(Rejected, match=reason):
        said(speak(template), *messages)


def test_the_projects_own_template_round_trips_tools_in_the_common_form(tokenizer) -> None:
    messages = [turn("system", "Be brief."), CALLS[0], assistant("", tool_calls=[CALL, CALL])]
    text, spans, _ = render([*messages, CALLS[2]], [TOOL], tokenizer)
    listed = text.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert [json.loads(line) for line in listed.splitlines()] == [TOOL]
    called = text[slice(*spans[0])].removesuffix("<|end|>")
    found = [part.split("\n</tool_call>")[0] for part in called.split("<tool_call>\n")[1:]]
    assert [json.loads(part) for part in found] == [CALL["function"]] * 2
    assert "<tool_response>\nIt is late.\n</tool_response>" in text
    assert text.count("### System:") == 1
