"""Rows of every common shape are read; one that cannot be used is named: file, line and reason."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import chat
from src.config import DataConfig
from src.data import rows
from src.data.rows import FIRST_ROWS, MAX_PROBLEMS, LeftOut, carries_loss, check_sources, read_rows
from src.data.sources import expand
from src.utils.errors import UserError

GOOD = chat("question", "answer")
PLAIN = chat("q", "a")["messages"]
ASKED, SYSTEM = PLAIN[:1], {"role": "system", "content": "s"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def read(source: str, left_out: list[LeftOut] | None = None, **data) -> list[dict]:
    return list(read_rows(source, DataConfig(train=source, **data), left_out))


def messages(source: object) -> list:
    return [row["messages"] for row in read(str(source))]


def problems(source: object, **data) -> tuple[str, ...]:
    """The lines that name what is wrong with the first rows of a source."""
    with pytest.raises(UserError) as error:
        check_sources(str(source), DataConfig(train=str(source), **data))
    return error.value.problems


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "a row must be an object, not list"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1: `role` is 'bot', not system"),
        ({"messages": [{"role": "user"}]}, "message 1: `content` must be text"),
        ({"messages": [SYSTEM, *PLAIN], "system": "b"}, "has both `system` and a system message"),
        ({"prompt": "x"}, "has ['prompt']; a row needs `messages`, `prompt` and `completion`"),
        ({"prompt": "x", "completion": 5}, "`completion` must be text, not int"),
        (chat("q", "cut \ud83d"), "cannot be written as UTF-8"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_line_and_reason_or_left_out(write_rows, bad, reason) -> None:
    file, left_out = write_rows(GOOD, "", bad, GOOD), []
    (problem,) = problems(file)
    assert problem.startswith(f"{file}:3: {reason}")
    assert len(read(file, left_out, bad_rows="skip")) == 2
    assert [row.place for row in left_out] == [f"{file}:3"]
    assert left_out[0].reason.startswith(reason)
    assert left_out[0].row == (bad if isinstance(bad, dict) else left_out[0].row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [SYSTEM, *PLAIN], "system": "s"}, [SYSTEM, *PLAIN]),
        ({"conversations": SHAREGPT, "system": "s"}, [SYSTEM, *PLAIN]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, *PLAIN]),
        ({"instruction": "q", "context": "c", "response": "a"}, chat("q\n\nc", "a")["messages"]),
        ({"instruction": "q", "input": "i", "output": "a"}, chat("q\n\ni", "a")["messages"]),
        ({"instruction": "q", "input": float("nan"), "output": "a"}, PLAIN),
        ({"instruction": "q", "input": [], "output": "a"}, PLAIN),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, [*PLAIN, *PLAIN]),
        ({"prompt": "q", "completion": "a", "label": True}, PLAIN),
        ({"prompt": ASKED, "completion": PLAIN[1:]}, PLAIN),
        ({"question": "q", "answer": "a", "id": 7}, PLAIN),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, PLAIN[1]]}, PLAIN),
        # What Parquet fills in where a row lacks a key of another one.
        ({"messages": [{**ASKED[0], "tool_calls": None}, {**PLAIN[1], "tool_calls": []}], "text": None}, PLAIN),
        # A cell of a table.
        ({"messages": json.dumps(PLAIN), "tools": ""}, PLAIN),
    ],
)  # fmt: skip
def test_rows_of_every_common_shape_become_conversations(write_rows, row, expected) -> None:
    (found,) = read(write_rows(row))
    assert found["messages"] == expected
    assert all(name in row for name in found["read_as"].split(" and "))


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {"a": 1}}]'},
        {"role": "assistant", "tool_calls": [{"function": '{"name": "f", "arguments": {"a": 1}}'}]},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ],
)  # fmt: skip
def test_tools_and_calls_of_them_are_read_from_each_form(write_rows, turn: dict) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tools in ([tool], json.dumps([tool])):
        (row,) = read(write_rows({"messages": [*ASKED, turn], "tools": tools}))
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [call]}
        assert row["tools"] == [tool]


def test_columns_of_other_names_are_mapped_and_a_wrong_name_is_named(write_rows) -> None:
    file = write_rows({"prompt": "x", "my answer": "y"})
    columns = {"prompt": "my answer", "completion": "prompt"}  # also crosswise
    assert [m["content"] for m in read(file, columns=columns)[0]["messages"]] == ["y", "x"]
    (problem,) = problems(file, columns={"prompt": "q"})
    assert ":1: data.columns, or adapt() in src/data/rows.py: KeyError: 'q'" in problem
    assert problem.endswith("the row has ['prompt', 'my answer']")


def test_a_wrong_header_is_named_once_with_the_key_that_maps_it(write_rows) -> None:
    file = write_rows(*[{"id": 5, "Die Frage": "x", "antwort": "y"}] * 50)
    (problem,) = problems(file)
    assert problem.startswith(f"{file}:1: has ['id', 'Die Frage', 'antwort']; a row needs")
    assert "or `text`; data.columns maps other names" in problem
    assert problem.endswith("(50 rows; data.bad_rows=skip leaves them out)")


def test_a_shape_of_ones_own_goes_through_adapt_whose_errors_name_the_row(
    write_rows, monkeypatch
) -> None:
    monkeypatch.setattr(rows, "adapt", lambda raw: {"prompt": raw["frage"], "completion": "y"})
    source = write_rows({"frage": "x"}, {"text": "b"})
    assert messages(write_rows({"frage": "x"}, name="b.jsonl")) == [chat("x", "y")["messages"]]
    assert (
        ":2: data.columns, or adapt() in src/data/rows.py: KeyError: 'frage'" in problems(source)[0]
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x", "completion": " "}, {"question": "", "answer": "y"}, {"text": ""},
        {"messages": ASKED}, chat("q", "  "), {"prompt": "q", "completion": "a", "label": False},
    ],
)  # fmt: skip
def test_rows_without_anything_to_learn_from_are_left_out(write_rows, row) -> None:
    file, left_out = write_rows(GOOD, row, GOOD), []
    assert len(read(file, left_out)) == 2
    assert [each.place for each in left_out] == [f"{file}:2"]
    alone = write_rows(row, name="alone.jsonl")
    assert problems(alone)[0].startswith(f"{alone}: no row can be used; {alone}:1: ")


def test_reasoning_is_dropped_on_request(write_rows) -> None:
    turn = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na", "reasoning_content": "hm"}
    file = write_rows({"messages": [*ASKED, turn]})
    assert read(file, thinking="drop")[0]["messages"] == PLAIN
    assert read(file)[0]["messages"][1] == turn


def test_different_problems_are_named_up_to_a_limit_and_equal_ones_once(write_rows) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert len(problems(write_rows(*[{letter: 1} for letter in letters]))) == MAX_PROBLEMS
    turns = [[*PLAIN] * n + [{"role": "bot"}] for n in range(9)]  # "message 1", "message 3", …
    (problem,) = problems(write_rows(*[{"messages": each} for each in turns]))
    assert "rows.jsonl:1: message 1: `role` is 'bot'" in problem
    assert "(9 rows; data.bad_rows=skip leaves them out)" in problem
    with pytest.raises(UserError, match=r"\(1,000 rows; "):  # reading stops there
        read(write_rows(*[{"x": 1}] * 5000))


def test_a_bad_row_among_the_first_is_named_before_the_others_are_read(write_rows) -> None:
    file = write_rows(GOOD, {"text": 5}, *[GOOD] * FIRST_ROWS, {"text": 6})
    assert problems(file) == (f"{file}:2: `text` must be text, not int",)


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in problems(tmp_path / "rows.jsonl")[0]
    assert "neither a .jsonl, .ndjson, .json, .csv, .parquet file nor a" in problems(tmp_path)[0]
    (tmp_path / "rows.jsonl").touch()
    assert "no rows; at least one is needed" in problems(tmp_path / "rows.jsonl")[0]


def test_a_pattern_names_several_files_and_what_exists_is_no_pattern(tmp_path: Path) -> None:
    names = [str(tmp_path / f"part-{n}.jsonl") for n in ("1", "2", "x [1]", "y?", "z*")]
    for name in reversed(names):
        Path(name).write_text(json.dumps(GOOD))
    assert expand(names) == names
    assert expand([f"{tmp_path}/*.jsonl", "org/name:main"]) == [*names, "org/name:main"]
    assert messages(names[2]) == [GOOD["messages"]]
    with pytest.raises(UserError, match="no file fits this pattern"):
        expand(f"{tmp_path}/*.csv")


def test_the_same_rows_come_from_every_format(tmp_path: Path, write_rows) -> None:
    raw = [{"prompt": f"q; {n}", "completion": f'a, "{n}"\nb'} for n in range(3)]
    lines = Path(write_rows(*raw)).read_bytes()
    for name in ("lines.json", "r.ndjson", "r.JSONL"):
        (tmp_path / name).write_bytes(lines)
    (tmp_path / "r.json").write_text(json.dumps(raw))
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / "r.parquet")
    for name, sign in (("r.csv", ","), ("semicolon.csv", ";"), ("tab.csv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, raw[0], delimiter=sign)
            writer.writeheader()
            writer.writerows(raw)
    for name in ("rows.jsonl", "r.json", "r.csv"):
        plain = (tmp_path / name).read_bytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain))
        with pa.CompressedOutputStream(str(tmp_path / f"{name}.zst"), "zstd") as stream:
            stream.write(plain)
    expected, paths = messages(tmp_path / "rows.jsonl"), [*tmp_path.iterdir()]
    assert {path.name: messages(path) for path in paths} == {path.name: expected for path in paths}


@pytest.mark.parametrize(
    ("key", "value", "fine"),
    [("weight", 0.0, True), ("train", False, True), ("trainable", 1, True),
     ("weight", "0", False), ("train", "false", False), ("weight", 0.5, False)],
)  # fmt: skip
def test_a_mark_of_what_carries_loss_is_read_or_refused(write_rows, key, value, fine) -> None:
    answer = {"role": "assistant", "content": "a", key: value}
    source = write_rows({"messages": [*ASKED, answer, answer | {key: 1}]})
    if fine:
        ((_, first, second),) = messages(source)
        assert (carries_loss(first), carries_loss(second)) == (value == 1, True)
    else:
        assert f":1: message 2: `{key}` must be 0 or 1, or true or false" in problems(source)[0]
