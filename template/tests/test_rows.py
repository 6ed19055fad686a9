"""Rows of every common shape are read; one that cannot be used is named: file, line and reason."""

import csv
import datetime
import gzip
import json
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import chat
from src.config import DataConfig, change_data
from src.data import rows
from src.data.rows import FIRST_ROWS, MAX_PROBLEMS, LeftOut, carries_loss, check_source, read_rows
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
        check_source("data.train", str(source), DataConfig(train=str(source), **data))
    return error.value.problems


def calling(*calls: object) -> dict:
    return {"messages": [*ASKED, {"role": "assistant", "tool_calls": [*calls]}]}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "a row is an object with `messages`"),
        ("[" * 100_000 + "]" * 100_000, "lists or objects nested too deeply"),
        ('{"prompt": "q", "completion": ' + "9" * 5000 + "}", "a number of more than 4,300 digits"),
        ('{"prompt": "cut \\ud83d", "completion": "a"}', "holds half of a character, '\\ud83d'"),
        ({"messages": "q"}, "`messages`: not valid JSON"),
        ({"messages": ["hi"]}, "message 1: must be an object with `role` and `content`, not text"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1: `role` is 'bot', not system"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1: `role` is ['user'], not system"),
        ({"messages": [{"role": "user"}]}, "message 1: `content` must be text, not null or missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: `content` has parts that are no text"),
        ({"messages": [SYSTEM, *PLAIN], "system": "b"}, "has both `system` and a system message"),
        ({**GOOD, "tools": "{"}, "`tools`: not valid JSON"),
        ({**GOOD, "tools": '{"a": 1}'}, "`tools` must be a list of objects, not an object"),
        ({**GOOD, "tools": [1]}, "`tools` must be a list of objects"),
        ({"prompt": "x"}, "`completion` is missing; it has `prompt`"),
        ({"output": "x"}, "`instruction` is missing; it has `output`"),
        ({"prompt": "x", "completion": 5}, "`completion` must be text, not a number"),
        ({"text": None}, "has no columns; a row needs"),
        ({"instruction": "q", "input": [1], "output": "a"}, "`input` must be text, not a list"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "`history` must be a list of [question, answer]"),
        ({"instruction": "q", "output": "a", "history": 5}, "`history` must be a list of [question, answer]"),
        (calling(None), "message 2: a call of a tool needs a `name`, and is null"),
        (calling({}), "message 2: a call of a tool needs a `name`, and is {}"),
        (calling("x"), "message 2: a call of a tool: not valid JSON"),
        (calling({"name": "f", "arguments": "[" * 9999}), "message 2: the arguments of `f`: lists or objects nested too deeply"),
        (calling({"name": "f", "arguments": "{"}), "message 2: the arguments of `f`: not valid JSON"),
        (calling({"name": "f", "arguments": [1]}), "message 2: the arguments of `f` must be an object, not a list"),
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
        {"role": "assistant", "tool_calls": {"name": "f", "arguments": {"a": 1}}},
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


def test_an_empty_argument_leaves_the_other_calls_as_they_are(write_rows) -> None:
    functions = [{"name": "f", "arguments": text} for text in ("", '{"a": 1}')] + [{"name": "f"}]
    (row,) = read(write_rows(calling(*functions)))
    found = [call["function"]["arguments"] for call in row["messages"][1]["tool_calls"]]
    assert found == [{}, {"a": 1}, {}]


def test_columns_of_other_names_are_mapped_and_a_wrong_name_is_named(write_rows) -> None:
    file = write_rows({"prompt": "x", "my answer": "y"})
    columns = {"prompt": "my answer", "completion": "prompt"}  # also crosswise
    assert [m["content"] for m in read(file, columns=columns)[0]["messages"]] == ["y", "x"]
    expected = "rows.jsonl:1: data.columns.prompt: no column `q`; it has `prompt`, `my answer` (data.columns=null maps none)"
    assert problems(file, columns={"prompt": "q"})[0].endswith(expected)


def test_a_wrong_header_is_named_once_with_the_keys_that_map_it(write_rows) -> None:
    file = write_rows(*[{"id": 5, "Die Frage": "x", "antwort": "y"}] * 50)
    (problem,) = problems(file)
    assert problem.startswith(f"{file}:1: has `id`, `Die Frage`, `antwort`; a row needs `messages`")
    keys = "'data.columns.prompt=Die Frage' data.columns.completion=antwort"
    assert problem.endswith(f"{keys} (50 rows; data.bad_rows=skip leaves them out)")


@pytest.mark.parametrize("name", ["Frage: was?", "no", " prompt", "[x]", "Antwort #1", "1e3"])
def test_the_key_that_maps_a_column_works_for_any_name(write_rows, name: str) -> None:
    (problem,) = problems(write_rows({name: "x", "other one": "y"}))
    keys = shlex.split(problem.partition("for example ")[2])
    data = DataConfig(train="-")
    assert change_data(data, keys).columns == {"prompt": name, "completion": "other one"}


def test_a_shape_of_ones_own_goes_through_adapt_whose_errors_name_the_row(
    write_rows, monkeypatch
) -> None:
    monkeypatch.setattr(rows, "adapt", lambda raw: {"prompt": raw["frage"], "completion": "y"})
    source = write_rows({"frage": "x"}, {"text": "b"})
    assert messages(write_rows({"frage": "x"}, name="b.jsonl")) == [chat("x", "y")["messages"]]
    assert ":2: adapt() in src/data/rows.py: KeyError: 'frage'" in problems(source)[0]


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
    assert problems(file) == (f"{file}:2: `text` must be text, not a number",)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_an_empty_or_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "no such file" in problems(tmp_path / name)[0]
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_text("")
    assert "no rows; at least one is needed" in problems(tmp_path / name)[0]


def test_a_pattern_names_several_files_and_what_exists_is_no_pattern(tmp_path: Path) -> None:
    for folder in ("a [1]", "b*"):
        (tmp_path / folder).mkdir()
        paths = [tmp_path / folder / f"part-{n}.jsonl" for n in ("1", "2", "x [1]", "y?", "z*")]
        for path in reversed(paths):
            path.write_text(json.dumps(GOOD))
        names = [str(path) for path in paths]
        assert expand(names) == names
        assert expand([f"{tmp_path}/{folder}/*.jsonl", "org/name:main"]) == [
            *names,
            "org/name:main",
        ]
        assert messages(names[2]) == [GOOD["messages"]]
        assert "a folder; name the files in it" in problems(tmp_path / folder)[0]
    for source, problem in (
        (f"{tmp_path}/a [1]/*.csv", "no file fits this pattern"),
        ("long" * 100, "File name too long"),
        ("~no-such-user/rows.jsonl", "there is no such home folder"),
    ):
        with pytest.raises(UserError, match=f": {problem}"):
            expand(source)


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
    comma = (tmp_path / "r.csv").read_text("utf-8-sig")
    (tmp_path / "blank.csv").write_text(f"\n,\n{comma}")
    (tmp_path / "excel.csv").write_text(f"sep=,\n{comma}")
    wide = f'"a, b"\t{(tmp_path / "tab.csv").read_text("utf-8-sig")}'.replace("\nq;", "\n\tq;")
    (tmp_path / "a comma in a name.csv").write_text(wide.replace('\n"q;', '\n\t"q;'))
    quoted = comma.replace("prompt,completion", 'prompt,completion,"a;b\nc;d;"', 1)
    (tmp_path / "a line end in a name.csv").write_text(quoted)
    expected = messages(tmp_path / "rows.jsonl")
    assert {path.name: messages(path) for path in tmp_path.iterdir()} == dict.fromkeys(
        [path.name for path in tmp_path.iterdir()], expected
    )


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("r.parquet", b"PAR1 not really", ": cannot be read: Parquet magic bytes not found"),
        ("r.jsonl", json.dumps(GOOD).encode() + b'\n{"text": "caf\xe9"}\n', ":2: not UTF-8"),
        ("r.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], ": cannot be read: Truncated compressed stream"),
        ("r.jsonl.gz", b"{}", ": cannot be read: zlib inflate failed"),
        ("r.json", b'[{"text": "a"},\n{]', ":2: cannot be read: not valid JSON"),
        ("r.json", b"[" * 100_000, ": cannot be read: lists or objects nested too deeply"),
        ("r.csv", "prompt,completion\ncaf\xe9,a\n".encode("latin1"), ": cannot be read: not UTF-8"),
        ("r.csv", b'prompt,completion\nc,"d\ne,f\n', ":2: not valid CSV from this line on"),
        ("r.csv", b'\nprompt,completion\na,b\nc,"d\n', ":4: not valid CSV from this line on"),
        ("r.csv", b'prompt,completion\na,b\nc,"d\ne,f\n', ":3: not valid CSV from this line on"),
        ("r.csv", b"prompt,completion,prompt\na,b,c\n", ":1: two columns are called prompt"),
        ("r.csv", b"prompt,completion\na,b\na,b,c\n", ":3: more cells than the header, line 1, has"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert problems(tmp_path / name)[0].startswith(f"{tmp_path / name}{problem}")


def test_a_table_of_one_column_has_commas_between_the_others(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text\na tab\tand; a semicolon\n")
    assert [row["text"] for row in read(str(tmp_path / "r.csv"))] == ["a tab\tand; a semicolon"]


def test_a_parquet_column_that_python_cannot_hold_is_not_read(tmp_path: Path) -> None:
    far = pa.array([2**62, 0], pa.timestamp("us"))  # after the year 9999
    nowhere = pa.array([0, 0], pa.timestamp("us", tz="Not/AZone"))
    table = {"text": ["one", "two"], "far": far, "nowhere": nowhere}
    pq.write_table(pa.table(table), tmp_path / "r.parquet")
    assert [row["text"] for row in read(str(tmp_path / "r.parquet"))] == ["one", "two"]


@pytest.mark.parametrize(("cell", "kind"), [(b"x", "bytes"), (datetime.date(2024, 1, 1), "date")])
def test_a_cell_of_another_type_is_named_with_the_cure(tmp_path: Path, cell, kind: str) -> None:
    pq.write_table(pa.table({"prompt": [cell], "completion": ["a"]}), tmp_path / "r.parquet")
    cure = "which adapt() in src/data/rows.py can turn into text"
    assert problems(tmp_path / "r.parquet")[0].endswith(
        f"r.parquet: row 1: `prompt` must be text, not {kind}, {cure}"
    )


def test_parquet_does_not_fill_the_keys_of_other_rows(tmp_path: Path) -> None:
    def row(name: str) -> dict:
        function = {"name": name, "parameters": {name: {"a": 1}}}
        call = {"type": "function", "function": {"name": name, "arguments": {name: 1}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        tools = [{"type": "function", "function": function}]
        return {"messages": [*ASKED, answer], "tools": tools}

    pq.write_table(pa.Table.from_pylist([row("x"), row("y")]), tmp_path / "rows.parquet")
    found = read(str(tmp_path / "rows.parquet"))
    assert [{key: each[key] for key in row("x")} for each in found] == [row("x"), row("y")]


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
