"""Odd rows and damaged files are read, or named in one line: file, line and reason."""

import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import chat
from test_rows import ASKED, GOOD, problems, read


def calling(*calls: object) -> dict:
    return {"messages": [*ASKED, {"role": "assistant", "tool_calls": [*calls]}]}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "not valid JSON: maximum recursion depth"),
        ('{"prompt": "q", "completion": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit (4300 digits)"),
        ({"messages": "q"}, "`messages`: not valid JSON"),
        ({"messages": []}, "has no messages"),
        ({"messages": [5]}, "message 1: it must be an object, not int"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1: `role` is \"['user']\", not system"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: each part of `content` must be text, not NoneType"),
        ({**GOOD, "tools": "{"}, "`tools`: not valid JSON"),
        ({**GOOD, "tools": '{"a": 1}'}, "`tools` must be a list, not dict"),
        ({**GOOD, "tools": [1]}, "a tool must be an object, not int"),
        ({"output": "x"}, "has ['output']; a row needs"),
        ({"text": None}, "has []; a row needs"),
        ({"instruction": "q", "input": [1], "output": "a"}, "`input` must be text, not list"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "`history` must be a list of [question, answer]"),
        ({"instruction": "q", "output": "a", "history": 5}, "`history` must be a list, not int"),
        (calling(None), "message 2: the `name` of a called tool must be text, not NoneType"),
        (calling({}), "message 2: the `name` of a called tool must be text, not NoneType"),
        (calling("x"), "message 2: a call of a tool: not valid JSON"),
        (calling({"name": "f", "arguments": "[" * 9999}), "message 2: `arguments`: not valid JSON: maximum recursion depth"),
        (calling({"name": "f", "arguments": "{"}), "message 2: `arguments`: not valid JSON"),
        (calling({"name": "f", "arguments": [1]}), "message 2: `arguments` must be an object, not list"),
    ],
)  # fmt: skip
def test_an_odd_row_is_named_by_file_line_and_reason(write_rows, bad, reason: str) -> None:
    file = write_rows(GOOD, bad, GOOD)
    (problem,) = problems(file)
    assert problem.startswith(f"{file}:2: {reason}")


def test_an_empty_argument_leaves_the_other_calls_as_they_are(write_rows) -> None:
    functions = [{"name": "f", "arguments": text} for text in ("", '{"a": 1}')] + [{"name": "f"}]
    (row,) = read(write_rows(calling(*functions)))
    found = [call["function"]["arguments"] for call in row["messages"][1]["tool_calls"]]
    assert found == [{}, {"a": 1}, {}]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("r.parquet", b"PAR1 not really", ": cannot be read: ArrowInvalid: Parquet magic bytes not found"),
        ("r.jsonl", json.dumps(GOOD).encode() + b'\n{"text": "caf\xe9"}\n', ":2: not valid JSON: 'utf-8' codec can't decode"),
        ("r.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], ": cannot be read: OSError: Truncated compressed stream"),
        ("r.jsonl.gz", b"{}", ": cannot be read: OSError: zlib inflate failed"),
        ("r.json", b'[{"text": "a"},\n{]', ": cannot be read: JSONDecodeError: Expecting property name enclosed in double quotes: line 2"),
        ("r.json", b"[" * 100_000, ": cannot be read: RecursionError"),
        ("r.csv", "prompt,completion\ncaf\xe9,a\n".encode("latin1"), ": cannot be read: UnicodeDecodeError"),
        ("r.csv", b'prompt,completion\nc,"d\ne,f\n', ":2: not valid CSV from this line on"),
        ("r.csv", b'prompt,completion\na,b\nc,"d\ne,f\n', ":3: not valid CSV from this line on"),
        ("r.csv", b'prompt,"completion\na,b\n', ":1: not valid CSV from this line on"),
        ("r.csv", b"prompt,completion,prompt\na,b,c\n", ":1: not valid CSV from this line on: two columns have the same name: ['prompt', 'completion', 'prompt']"),
        ("r.csv", b"prompt,completion\na,b\na,b,c\n", ":3: more cells than the header has"),
        ("r.csv", b"", ": no rows; at least one is needed"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert problems(tmp_path / name)[0].startswith(f"{tmp_path / name}{problem}")


def test_names_that_cannot_be_a_source_are_refused() -> None:
    assert "neither a" in problems("long name" * 100)[0]


def test_a_table_of_one_column_has_commas_between_the_others(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text\na tab\tand; a semicolon\n")
    assert [row["text"] for row in read(str(tmp_path / "r.csv"))] == ["a tab\tand; a semicolon"]


@pytest.mark.parametrize(("cell", "kind"), [(b"x", "bytes"), (datetime.date(2024, 1, 1), "date")])
def test_a_cell_of_another_type_is_named(tmp_path: Path, cell, kind: str) -> None:
    pq.write_table(pa.table({"prompt": [cell], "completion": ["a"]}), tmp_path / "r.parquet")
    (problem,) = problems(tmp_path / "r.parquet")
    assert problem.endswith(f"r.parquet: row 1: `prompt` must be text, not {kind}")


def test_parquet_does_not_fill_the_keys_of_other_rows(tmp_path: Path) -> None:
    def row(name: str) -> dict:
        function = {"name": name, "parameters": {name: {"a": 1}}}
        call = {"type": "function", "function": {"name": name, "arguments": {name: 1}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        tools = [{"type": "function", "function": function}]
        return {"messages": [*chat("q", "a")["messages"], answer], "tools": tools}

    pq.write_table(pa.Table.from_pylist([row("x"), row("y")]), tmp_path / "rows.parquet")
    found = read(str(tmp_path / "rows.parquet"))
    assert [{key: each[key] for key in row("x")} for each in found] == [row("x"), row("y")]
