"""Labels under the chat templates that people have: those that TRL ships, as their models do."""

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import TEMPLATE

sys.path.insert(0, str(TEMPLATE))
FOLDER = Path(str(getattr(find_spec("trl"), "origin", ""))).parent / "chat_templates"
# With a twin in which its authors mark what the assistant says; images are not for us.
OF_IMAGES = {"idefics3", "llava_next", "smolvlm"}
NAMES = sorted(
    {path.stem.removesuffix("_training") for path in FOLDER.glob("*_training.jinja")} - OF_IMAGES
)
SPECIAL = re.compile(
    r"<\|[^|<>\s{}]+\|>|<\uff5c[^\uff5c<>]+\uff5c>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|</?s>|<eos>|<bos>"
    r"|</?tool_call>|</?think>|<\|?[a-z_]+\|?>(?!\w)|\[/?INST\]|\[gMASK\]|<sop>"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CONVERSATIONS = {
    "one turn": [user("Ask one?"), assistant("Reply one.")],
    "three turns": [
        *(user("Ask one?"), assistant("Reply one."), user("Ask two?"), assistant("Reply two.")),
        *(user("Ask three?"), assistant("Reply three.")),
    ],
    "system": [
        {"role": "system", "content": "Rule it."},
        *(user("Ask one?"), assistant("Reply one.")),
    ],
    "thinking": [
        *(user("Ask one?"), assistant("Reply one.", reasoning_content="Ponder one.")),
        *(user("Ask two?"), assistant("Reply two.", reasoning_content="Ponder two.")),
    ],
    "inline thinking": [
        *(user("Ask one?"), assistant("<think>\nPonder one.\n</think>\n\nReply one.")),
        *(user("Ask two?"), assistant("<think>\nPonder two.\n</think>\n\nReply two.")),
    ],
    "tools": [
        *(user("Ask one?"), assistant("", tool_calls=[CALL])),
        *({"role": "tool", "name": "weather", "content": "Sunny it is."}, assistant("Reply one.")),
    ],
}
ALTERNATE = "Conversation roles must alternate"
LEFT_OUT = "leaves out"
REFUSED = {
    ("gemma", "system"): "System role not supported",
    **{(name, "tools"): ALTERNATE for name in ("cohere", "cohere2", "gemma", "gemma3")},
    **{
        (name, "tools"): LEFT_OUT
        for name in ("deepseek_r1_distill", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl")
    },
}


@cache
def tokenizer(name: str) -> Any:
    """The tiny tokenizer, with a template's special tokens and the template."""
    from transformers import AutoTokenizer

    made: Any = AutoTokenizer.from_pretrained(TEMPLATE / "configs/tiny")
    template = (FOLDER / f"{name}.jinja").read_text()
    tokens = sorted(set(SPECIAL.findall(template)))
    made.add_special_tokens({"additional_special_tokens": tokens})
    made.chat_template = template
    return made


def check(name: str, messages: list[dict], tools: list[dict] | None) -> bool:
    """Check a conversation's labels; return whether each span follows its whole prompt."""
    from src.data.chat import chat_text, render, turn_format

    speaker = tokenizer(name)
    text, spans, prompted = render(messages, tools, speaker)
    said = [text[start:end] for start, end in spans]
    starts = {start for start, _ in spans}
    for token in SPECIAL.finditer(text):
        assert starts.isdisjoint(range(token.start() + 1, token.end()))
    turns = [m for m in messages if m["role"] == "assistant"]
    assert len(said) == len(turns)
    ends = turn_format(speaker, speaker.chat_template).end_tokens
    for turn, span in zip(turns, said, strict=True):
        assert turn["content"].split("</think>")[-1].strip() in span
        assert span.endswith(ends), "an answer that does not end would run on"
        for call in turn.get("tool_calls", ()):
            assert call["function"]["name"] in span
    for message in messages:
        if message["role"] != "assistant":
            assert not any(message["content"] in span for span in said)
    reasons = [
        re.findall(r"Ponder \w+\.", m.get("reasoning_content") or m["content"]) for m in turns
    ]
    for reason in (reason for each in reasons for reason in each):
        assert (reason in text) == any(reason in span for span in said)
    if prompted:
        last = max(n for n, m in enumerate(messages) if m["role"] == "assistant")
        prompt = chat_text(speaker, messages[:last], True, tools)
        shown = text[: spans[-1][0]]
        # All of it, where nothing before is written otherwise now that an answer follows.
        assert shown.endswith(prompt[-20:])
    return prompted


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_what_the_assistant_says_is_labelled_and_nothing_else(name: str, kind: str) -> None:
    tools = [WEATHER] if kind == "tools" else None
    if reason := REFUSED.get((name, kind)):
        with pytest.raises(ValueError, match=reason):
            check(name, CONVERSATIONS[kind], tools)
        return
    check(name, CONVERSATIONS[kind], tools)


def test_nearly_all_conversations_are_labelled() -> None:
    from src.data.chat import render

    refused: list[str] = []
    for name in NAMES:
        for kind, messages in CONVERSATIONS.items():
            try:
                render(messages, [WEATHER] if kind == "tools" else None, tokenizer(name))
            except ValueError as error:
                refused.append(str(error))
    assert len(NAMES) >= 25
    assert len(refused) == len(REFUSED) <= 0.07 * len(NAMES) * len(CONVERSATIONS), refused


@pytest.mark.parametrize("name", NAMES)
def test_the_spans_are_those_that_the_templates_authors_mark(name: str) -> None:
    # But for headers, which the generation prompt writes, and what follows the stop token.
    from src.data.chat import render

    for kind, messages in CONVERSATIONS.items():
        tools = [WEATHER] if kind == "tools" else None
        if (name, kind) in REFUSED or (name, kind) == ("diffusion_gemma", "tools"):
            continue  # the second hands over by <|tool_response>, which its twin leaves unmarked
        ours, twin = (render(messages, tools, tokenizer(n)) for n in (name, f"{name}_training"))
        if ours.text != twin.text:
            continue  # such a twin keeps earlier reasoning
        marked = [n for start, end in twin.spans for n in range(start, end)]
        for start, end in ours.spans:
            lacking = {*range(start, end)} - {*marked}
            assert not ours.text[min(lacking, default=0) : max(lacking, default=-1) + 1].strip()


@pytest.mark.parametrize("kind", ["one turn", "three turns", "system", "tools"])
@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_that_generate_is_given_begin_what_was_trained(name: str, kind: str) -> None:
    from src.data.chat import chat_text, render
    from src.data.encoding import encode

    if (name, kind) in REFUSED:
        return
    messages, speaker = CONVERSATIONS[kind], tokenizer(name)
    tools = [WEATHER] if kind == "tools" else None
    rendered = render(messages, tools, speaker)
    (tokens,) = encode([rendered], speaker)
    prompt = chat_text(speaker, messages[:-1], True, tools)
    asked = speaker(prompt, add_special_tokens=False)["input_ids"]
    begins = tokens["input_ids"][: len(asked)].tolist() == asked
    assert begins or not rendered.prompted  # which is of all answers, not the last alone
    if kind in {"one turn", "system"}:
        assert begins == rendered.prompted
    if begins:  # and what comes next is the first token that the model must say
        assert tokens["labels"][len(asked)] == tokens["input_ids"][len(asked)]


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="<>|{}"),
    min_size=1,
).filter(lambda text: text.strip())
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "glm4moe", "gptoss", "deepseekv3"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(turns=TURNS)
def test_any_conversation_is_labelled(name: str, turns: list[tuple[str, str]]) -> None:
    from src.data.chat import render

    messages = [m for n, (a, b) in enumerate(turns) for m in (user(f"U{n}: {a}"), assistant(b))]
    text, spans, _ = render(messages, None, tokenizer(name))
    assert len(spans) == len(turns)
    for (_, answer), (start, end) in zip(turns, spans, strict=True):
        assert answer.strip() in text[start:end]
        assert not re.search(r"U\d: ", text[start:end].replace(answer.strip(), ""))
