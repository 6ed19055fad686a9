"""What is trained is what the row says, and what is asked is the prompt that training saw.

Every shape of rows in every format under four kinds of templates: the project's own, ChatML, Llama
3's, and one whose author marked the assistant's turns. The rendered project tests its own template.
"""

import copy
import csv
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import TEMPLATE

sys.path.insert(0, str(TEMPLATE))
CALLS = (
    "{% for t in m.tool_calls or [] %}<tool_call>{{ t.function.name }} "
    "{{ t.function.arguments | tojson }}</tool_call>{% endfor %}"
)
CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    f"{{{{ m.content }}}}{CALLS}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start|>tools<|stop|>\n\n{{ tools | tojson }}<|eot|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    f"{{{{ m.content | trim }}}}{CALLS}<|eot|>{{% endfor %}}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
# The marks end before the turn does: taken as they are, answers would never stop.
MARKED = CHATML.replace(
    f"{{{{ m.content }}}}{CALLS}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}" + CALLS
    + "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>",
)  # fmt: skip
TEMPLATES = {"own": None, "chatml": CHATML, "llama3": LLAMA3, "marked": MARKED}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>"]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"at": "where"}}}


def turn(role: str, content: str = "", **more: Any) -> dict:
    return {"role": role, "content": content, **more}


def call(**arguments: str) -> dict:
    return {"type": "function", "function": {"name": "look", "arguments": arguments}}


ASKED, SAID = turn("user", "Which one?"), turn("assistant", "The first.")
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "messages": ({"messages": [ASKED, SAID]}, ["The first."]),
    "two turns": (
        {"messages": [ASKED, SAID, turn("user", "And then?"), turn("assistant", "The second.")]},
        ["The first.", "The second."],
    ),
    "system message": ({"messages": [turn("system", "Be brief."), ASKED, SAID]}, ["The first."]),
    "system column": ({"messages": [ASKED, SAID], "system": "Be brief."}, ["The first."]),
    "pair with system": (
        {"prompt": "Which one?", "completion": "The first.", "system": "Be brief."},
        ["The first."],
    ),
    "instruction": (
        {"instruction": "Which one?", "input": "Of the two.", "output": "The first."},
        ["The first."],
    ),
    "dolly": (
        {"instruction": "Which one?", "context": "Of the two.", "response": "The first."},
        ["The first."],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Which one?"},
                           {"from": "gpt", "value": "The first."}], "system": "Be brief."},
        ["The first."],
    ),
    "question": ({"question": "Which one?", "answer": "The first."}, ["The first."]),
    "opened by the assistant": (
        {"messages": [turn("assistant", "Hello."), ASKED, SAID]}, ["Hello.", "The first."],
    ),
    "not all trained": (
        {"messages": [ASKED, turn("assistant", "Wrong.", weight=0), ASKED,
                      turn("assistant", "Bad.", train=False), ASKED, SAID]},
        ["The first."],
    ),
    "tools": (
        {"messages": [turn("system", "Be brief."), ASKED,
                      turn("assistant", "", tool_calls=[call(at="home"), call(at="work")]),
                      turn("tool", "It is at home."), SAID], "tools": [TOOL]},
        ["home", "The first."],
    ),
    "reasoning": (
        {"messages": [ASKED, turn("assistant", "The first.", reasoning_content="Of two.")]},
        ["The first."],
    ),
}  # fmt: skip


@cache
def loaded() -> Any:
    """Load the tiny tokenizer once: a copy of it takes a tenth of the time."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TEMPLATE / "configs/tiny")


def speak(template: str | None) -> Any:
    """Return the tiny tokenizer with a chat template, or with the project's own."""
    tokenizer = copy.deepcopy(loaded())
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    own = (TEMPLATE / "configs/chat_template.j2").read_text()
    tokenizer.chat_template = template or own
    return tokenizer


def words(value: Any) -> list[str]:
    """All that a row says, and that is no name of a column or role."""
    if isinstance(value, dict):
        skipped = {"role", "from", "type", "weight", "train"}
        return [word for k, v in value.items() if k not in skipped for word in words(v)]
    if isinstance(value, list):
        return [word for each in value for word in words(each)]
    return [value] if isinstance(value, str) and value else []


def write(row: dict, form: str, folder: Path) -> str:
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    elif form == "parquet":  # beside one with other keys, which Arrow fills with nulls
        other = {**row, "messages": [turn("user", "x", other="y"), turn("assistant", "z")]}
        table = [row, other] if "messages" in row else [row]
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            writer.writeheader()
            writer.writerow(row)
    return str(path)


FORMS = [
    (shape, form)
    for shape, (row, _) in SHAPES.items()
    for form in ("jsonl", "parquet", "csv")
    if form != "csv" or all(isinstance(cell, str) for cell in row.values())
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(("shape", "form"), FORMS)
def test_what_is_labelled_is_what_the_assistant_says_and_what_is_asked_was_trained(
    shape: str, template: str, form: str, tmp_path: Path
) -> None:
    from src.config import DataConfig
    from src.data import IGNORE
    from src.data.answers import read_question
    from src.data.chat import chat_text
    from src.data.encoding import encode, render_row, stop_token_ids
    from src.data.rows import read_rows
    from src.data.sources import raw_rows

    raw, expected = SHAPES[shape]
    tokenizer, data = speak(TEMPLATES[template]), DataConfig(train="-")
    source = write(raw, form, tmp_path)
    row = next(iter(read_rows(source, data)))
    rendered = render_row(row, tokenizer)
    (tokens,) = encode([rendered], tokenizer)
    ids, labels = tokens["input_ids"].tolist(), tokens["labels"].tolist()
    text = tokenizer.decode(ids)
    said = "".join(
        tokenizer.decode([i]) if label != IGNORE else "\0"
        for i, label in zip(ids, labels, strict=True)
    )
    spans = [span for span in said.split("\0") if span]
    stop = tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)[-1])
    assert len(spans) == len(expected)
    for span, wanted in zip(spans, expected, strict=True):
        assert wanted in span
        assert span.endswith(stop), "else answers never stop"
    assert rendered.prompted
    for word in words(raw):
        assert word in text, "nothing of a row is left out"
    # The question of the last answer, as inference would ask it from the same file.
    _, first = next(iter(raw_rows(source)))
    asked = read_question(first, data)
    assert asked["messages"] == row["messages"][:-1]
    prompt = chat_text(tokenizer, asked["messages"], True, asked["tools"])
    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    starts = [
        n for n, label in enumerate(labels) if label != IGNORE and labels[n - 1] == IGNORE
    ]  # fmt: skip
    assert ids[: len(prompt)] == prompt
    assert len(prompt) == starts[-1], "where the last answer begins"


def said(messages: list[dict], tokenizer: Any, tools: list[dict] | None = None) -> list[str]:
    from src.data.chat import render

    text, spans, _ = render(messages, tools, tokenizer)
    return [text[start:end] for start, end in spans]


def refused(*messages: dict, tokenizer: Any) -> str:
    from src.data import Rejected

    with pytest.raises(Rejected) as error:
        said([*messages], tokenizer)
    return str(error.value)


def test_a_named_template_is_picked_as_transformers_picks_it() -> None:
    tokenizer = speak(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": LLAMA3}
    assert said([ASKED, SAID], tokenizer) == ["The first.<|im_end|>"]
    assert said([ASKED, SAID], tokenizer, [TOOL]) == ["The first.<|eot|>"]


def test_a_turn_that_a_template_drops_is_refused() -> None:
    drops = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    turns = SHAPES["tools"][0]["messages"]
    assert refused(*turns, tokenizer=speak(drops)) == "the chat template leaves out message 4"


def test_a_template_whose_text_changes_is_refused_with_the_likely_cause() -> None:
    clock = speak("{{ strftime_now('%f') }}" + CHATML)
    assert "depends on their content or on the time" in refused(ASKED, SAID, tokenizer=clock)


def test_a_first_message_that_a_template_writes_as_the_users_is_refused() -> None:
    # As Llama 3.1 does with tools; what stands before it would be labelled.
    turns = "{{ messages[0].content }}<|eot|>{% for m in messages[1:] %}"
    other = speak(LLAMA3.replace("{% for m in messages %}", f"<|start|>user<|stop|>\n\n{turns}"))
    assert said([ASKED, SAID], other) == ["The first.<|eot|>"]
    expected = "the chat template writes an answer without the header of its prompt"
    assert refused(turn("assistant", "Hello."), ASKED, SAID, tokenizer=other) == expected


def test_a_row_that_holds_a_marker_is_refused_in_words() -> None:
    for answer in (
        turn("assistant", "x", reasoning_content="Qzx0xzQ"),
        turn("assistant", "", tool_calls=[call(at="Qzx9xzQ")]),
    ):
        assert "holds text such as Qzx1xzQ" in refused(ASKED, answer, tokenizer=speak(CHATML))


def test_a_call_alone_before_another_answer_keeps_the_header_unlabelled() -> None:
    # As Qwen 3 writes reasoning: of the last turn alone, so that a shorter conversation differs.
    thinks = "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    tokenizer = speak(CHATML.replace("{{ m.content }}", thinks))
    called, answered = said(
        [ASKED, turn("assistant", tool_calls=[call(at="home")]), SAID], tokenizer
    )
    assert called.startswith("<tool_call>look")
    assert answered == "<think></think>The first.<|im_end|>"
