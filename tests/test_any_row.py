"""Any JSON in any field that is read becomes a row, or one line that says what is wrong with it."""

import json
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import TEMPLATE

sys.path.insert(0, str(TEMPLATE))
NAMES = ["user", "assistant", "system", "tool", "function_call", "gpt"]
WORDS = ["", " ", "{", "[1]", '{"name": "f"}', "null", "\ud800", "<|end|>", "</think>", "Qzx0xzQ"]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(NAMES + WORDS), st.text()
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "arguments", "function", "text", ""]), inner),
    ),
    max_leaves=8,
)
TEXT = st.sampled_from(["Which one?", "The first.", *WORDS]) | ANYTHING
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(NAMES) | ANYTHING, "content": TEXT},
    optional=dict.fromkeys(
        ("from", "value", "tool_calls", "function_call", "weight", "train", "reasoning_content"),
        ANYTHING,
    ),
)
MESSAGES = st.lists(MESSAGE | ANYTHING, min_size=1, max_size=4) | ANYTHING
PAIR = ("prompt", "completion", "instruction", "input", "output", "question", "answer", "context")
ROW = st.one_of(
    ANYTHING,
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"tools": ANYTHING, "system": TEXT}),
    st.fixed_dictionaries({"prompt": TEXT | MESSAGES, "completion": TEXT | MESSAGES}),
    st.fixed_dictionaries({"text": TEXT}),
    st.dictionaries(st.sampled_from([*PAIR, "history", "label", "tools", "system_prompt"]), TEXT),
)


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    made: Any = AutoTokenizer.from_pretrained(TEMPLATE / "configs/tiny")
    made.chat_template = (TEMPLATE / "configs/chat_template.j2").read_text()
    return made


@settings(
    max_examples=200, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(row=ROW)
def test_any_row_is_read_or_named_in_one_line(row: Any, tmp_path: Path) -> None:
    from src.config import DataConfig
    from src.data import Rejected
    from src.data.answers import read_question
    from src.data.encoding import encode, render_row
    from src.data.rows import check_sources, read_rows
    from src.utils.errors import UserError

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    data, left_out = DataConfig(train=str(path), bad_rows="skip"), []
    read = list(read_rows(str(path), data, left_out))
    assert len(read) + len(left_out) == 1
    for each in read:
        with suppress(Rejected):
            list(encode([render_row(each, tokenizer())], tokenizer()))
    json.dumps([each._asdict() for each in left_out])
    if not read:
        with pytest.raises(UserError) as error:
            check_sources(str(path), DataConfig(train=str(path)))
        (problem,) = error.value.problems
        assert problem.startswith(f"{path}:")
        assert len(problem.splitlines()) == 1
        assert len(problem) < 500
    with suppress(Rejected):
        read_question(row, data)


@pytest.mark.parametrize("depth", [400, 800, 950, 2000])
@pytest.mark.parametrize("where", ["tools", "messages", "other"])
def test_a_row_nested_deeply_is_read_or_named(depth: int, where: str, tmp_path: Path) -> None:
    from src.config import DataConfig
    from src.data.rows import read_rows

    path = tmp_path / "rows.jsonl"
    nested = "[" * depth + "]" * depth
    path.write_text(f'{{"prompt": "q", "completion": "a", "{where}": [{{"x": {nested}}}]}}')
    left_out = []
    read = list(read_rows(str(path), DataConfig(train=str(path), bad_rows="skip"), left_out))
    assert len(read) + len(left_out) == 1
    json.dumps([each._asdict() for each in left_out], default=str)
