"""Each row that training cannot use is named: file, line and reason."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import chat
from src.config import DataConfig
from src.data import rows
from src.data.rows import FIRST_ROWS, Tally, check_source, read_rows, trains
from src.data.sources import expand
from src.utils.errors import UserError

GOOD, DATA = chat("question", "answer"), DataConfig(train="rows")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "a row is an object with `messages`"),
        ("null", "a row is an object"),
        ("[" * 100_000 + "]" * 100_000, "lists or objects nested too deeply"),
        ('{"prompt": "q", "completion": ' + "9" * 5000 + "}", "a number of more than 4,300 digits"),
        ('{"prompt": "cut \\ud83d", "completion": "a"}', "holds half of a character, '\\ud83d'"),
        ({"mesages": []}, "has `mesages`; a row needs `messages`"),
        ({"messages": []}, "`messages` must be a list with at least one message"),
        ({"messages": ["hi"]}, "message 1: must be an object with `role` and `content`, not text"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1: `role` is 'bot', not system"),
        ({"messages": [{"role": "user"}]}, "message 1: `content` is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: `content` is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1: `content` has parts that are no text"),
        ({**GOOD, "tools": "{"}, "`tools`: not valid JSON"),
        ({**GOOD, "tools": "{}"}, "`tools` must be a list"),
        ({"prompt": "x"}, "`completion` is missing; it has `prompt`"),
        ({"output": "x"}, "`instruction` is missing; it has `output`"),
        ({"prompt": "x", "completion": 5}, "`completion` must be text, not a number"),
        ({"text": None}, "has no columns; a row needs"),
        ({"text": 5}, "`text` must be text, not a number"),
        ({"messages": [{"role": "system", "content": "a"}, *GOOD["messages"]], "system": "b"}, "has both `system` and a system message"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "`history` must be a list of [question, answer]"),
        ({"instruction": "q", "output": "a", "history": 5}, "`history` must be a list of [question, answer]"),
        ({"messages": [{"role": [], "content": "x"}]}, "message 1: `role` is [], not system"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1: `role` is ['user'], not system | user"),
        ({"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": [None]}]}, "message 3: a call of a tool needs `name` and `arguments`, and is null"),
        ({"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": "look"}]}, "message 3: `tool_calls`: not valid JSON"),
        ({"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 9999}}]}]}, "message 3: the arguments of `f`: lists or objects nested too deeply"),
        ({**GOOD, "tools": [1]}, "`tools` must be a list of objects"),
        ({"instruction": "q", "input": [1], "output": "a"}, "`input` must be text, not a list"),
        ({"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "message 3: the arguments of `f`: not valid JSON"),
        ({"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]}, "message 3: the arguments of `f` must be an object, not a list"),
        ({"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": ["x"]}]}, "message 3: a call of a tool: not valid JSON"),
        ({"messages": [*GOOD["messages"], {"role": "assistant", "tool_calls": [{}]}]}, "message 3: a call of a tool needs `name` and `arguments`, and is {}"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_line_and_reason(write_rows, bad, reason: str) -> None:
    file = write_rows(GOOD, "", bad, GOOD)
    with pytest.raises(UserError) as error:
        check_source("data.train", file, DATA)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(f"{file}:3: {reason}"), error.value.problems
    tally = Tally()
    skip = DataConfig(train=file, bad_rows="skip")
    assert len(list(read_rows(file, skip, tally))) == 2
    assert [row["place"] for row in tally.unusable] == [f"{file}:3"]


ASKED = [{"role": "user", "content": "q"}]
ANSWERED = [{"role": "assistant", "content": "a"}]
PLAIN = [*ASKED, *ANSWERED]
SAID = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": PLAIN}, PLAIN),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, PLAIN),
        ({"messages": PLAIN, "system": "s"}, [SAID, *PLAIN]),
        ({"messages": [SAID, *PLAIN], "system": "s"}, [SAID, *PLAIN]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, [SAID, *PLAIN]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [SAID, *PLAIN]),
        ({"instruction": "q", "context": "c", "response": "a"}, [{"role": "user", "content": "q\n\nc"}, *ANSWERED]),
        ({"question": "q", "context": "c", "answer": "a"}, [{"role": "user", "content": "q\n\nc"}, *ANSWERED]),
        ({"instruction": "q", "input": float("nan"), "output": "a"}, PLAIN),
        ({"instruction": "q", "input": [], "output": "a"}, PLAIN),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, [*PLAIN, *PLAIN]),
        ({"prompt": "q", "completion": "a", "label": True}, PLAIN),
        ({"prompt": "q", "completion": "a"}, PLAIN),
        ({"prompt": ASKED, "completion": ANSWERED}, PLAIN),
        ({"question": "q", "answer": "a", "id": 7}, PLAIN),
        ({"instruction": "q", "input": "", "output": "a"}, PLAIN),
        ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\n\ni"}, *ANSWERED]),
        ({"prompt": "q", "response": "a", "system": "s"}, [{"role": "system", "content": "s"}, *PLAIN]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *ANSWERED]}, PLAIN),
        # What Parquet fills in where a row lacks a key of another one.
        ({"messages": [{"role": "user", "content": "q", "tool_calls": None}, *ANSWERED], "text": None}, PLAIN),
        ({"messages": [*ASKED, {"role": "assistant", "content": "a", "tool_calls": []}]}, PLAIN),
    ],
)  # fmt: skip
def test_rows_of_every_common_shape_become_conversations(write_rows, row, messages) -> None:
    (read,) = read_rows(write_rows(row), DATA)
    assert read["messages"] == messages
    assert all(name in row for name in read["read_as"].split(" and "))


def test_tools_and_calls_of_them_are_kept(write_rows) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    call = {"function": {"name": "look", "arguments": "{}"}}
    turns = [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "r"}]
    for tools in ([tool], json.dumps([tool])):
        (row,) = read_rows(write_rows({"messages": turns, "tools": tools}), DATA)
        assert row["tools"] == [tool]
        found = {"type": "function", "function": {"name": "look", "arguments": {}}}
        assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [found]}


def test_columns_of_other_names_are_mapped_and_a_wrong_name_is_told(write_rows) -> None:
    file = write_rows({"q": "x", "a": "y"})
    data = DataConfig(train=file, columns={"prompt": "q", "completion": "a"})
    assert [m["content"] for m in next(read_rows(file, data))["messages"]] == ["x", "y"]
    data = DataConfig(train=file, columns={"prompt": "question", "completion": "a"})
    expected = r"rows.jsonl:1: data.columns.prompt: no column `question`; it has `q`, `a`"
    with pytest.raises(UserError, match=expected):
        list(read_rows(file, data))


def test_a_bad_row_among_the_first_is_named_before_the_others_are_read(write_rows) -> None:
    file = write_rows(GOOD, {"text": 5}, *[GOOD] * FIRST_ROWS, {"text": 6})
    with pytest.raises(UserError, match=r"rows.jsonl:2: `text` must be text, not a number$"):
        check_source("data.train", file, DATA)


def test_an_adapt_that_fails_names_the_row(write_rows, monkeypatch) -> None:
    monkeypatch.setattr(rows, "adapt", lambda raw: {"text": raw["ticket"]})
    source = write_rows({"ticket": "a"}, {"text": "b"})
    with pytest.raises(UserError, match=r"rows.jsonl:2: adapt\(\) in src/data/rows.py: KeyError"):
        list(read_rows(source, DATA))


def test_a_shape_of_ones_own_goes_through_adapt(write_rows, monkeypatch) -> None:
    file = write_rows({"frage": "x", "antwort": "y"})
    monkeypatch.setattr(
        rows, "adapt", lambda raw: {"prompt": raw["frage"], "completion": raw["antwort"]}
    )
    assert next(read_rows(file, DATA))["messages"][1] == {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x", "completion": " "}, {"question": "", "answer": "y"}, {"text": ""},
        {"messages": ASKED}, chat("q", "  "),
    ],
)  # fmt: skip
def test_rows_without_anything_to_learn_from_are_left_out_and_counted(write_rows, row) -> None:
    tally = Tally()
    assert len(list(read_rows(write_rows(GOOD, row, GOOD), DATA, tally))) == 2
    assert (len(tally.empty), tally.unusable) == (1, [])
    assert tally.empty[0]["place"].endswith("rows.jsonl:2")


def test_bad_rows_are_left_out_and_kept_with_their_reasons_if_wanted(write_rows) -> None:
    file, tally = write_rows(GOOD, "{not json", {"x": 1}, GOOD), Tally()
    assert len(list(read_rows(file, DataConfig(train=file, bad_rows="skip"), tally))) == 2
    assert [each["place"] for each in tally.unusable] == [f"{file}:2", f"{file}:3"]
    assert tally.unusable[1]["reason"].startswith("has `x`; a row needs")
    assert tally.unusable[1]["row"] == {"x": 1}


def test_a_file_of_which_nothing_is_left_says_why(write_rows) -> None:
    file = write_rows({"x": 1}, {"x": 2})
    expected = r"rows.jsonl: no row can be used; .*rows.jsonl:1: has `x`; a row needs"
    with pytest.raises(UserError, match=expected):
        check_source("data.train", file, DataConfig(train=file, bad_rows="skip"))
    with pytest.raises(UserError, match=r"no row can be used; .*:1: nothing to learn from"):
        check_source("data.train", write_rows(chat("q", "")), DATA)


def test_reasoning_is_dropped_if_wanted(write_rows) -> None:
    turn = {"role": "assistant", "content": "<think>\nhm\n</think>\n\na", "reasoning_content": "hm"}
    file = write_rows({"messages": [*ASKED, turn]})
    (row,) = read_rows(file, DataConfig(train=file, thinking="drop"))
    assert row["messages"] == PLAIN
    (row,) = read_rows(file, DATA)
    assert row["messages"][1] == turn


def test_different_problems_are_reported_up_to_a_limit_and_equal_ones_once(write_rows) -> None:
    with pytest.raises(UserError) as error:
        list(read_rows(write_rows(*[{f"x{n}": 1} for n in range(50)]), DATA))
    assert len(error.value.problems) == 21
    file = write_rows(GOOD, *[{"frage": 1, "antwort": 2}] * 50)
    with pytest.raises(UserError) as error:
        list(read_rows(file, DATA))
    (problem,) = error.value.problems
    assert problem.startswith(f"{file}:2: has `frage`, `antwort`; a row needs `messages`")
    assert problem.endswith(
        "for other names set data.columns.prompt=… and data.columns.completion=… "
        "(50 rows; data.bad_rows=skip leaves them out)"
    )
    with pytest.raises(UserError) as error:
        list(read_rows(write_rows(*[{"x": 1}] * 5000), DATA))
    assert error.value.problems[1].startswith("stopped reading after 1,000 bad rows")


def test_a_byte_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:2: not UTF-8"):
        check_source("data.train", str(file), DATA)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_an_empty_or_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        check_source("data.train", str(tmp_path / name), DATA)
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="no rows"):
        check_source("data.train", str(tmp_path / name), DATA)


def messages(file: str) -> list:
    return [row["messages"] for row in read_rows(file, DATA)]


def test_a_pattern_names_several_files_in_order_and_a_folder_is_told_so(tmp_path: Path) -> None:
    for n in (2, 10, 1):
        (tmp_path / f"part-{n:02}.jsonl").write_text("")
    found = expand([str(tmp_path / "part-*.jsonl"), "org/name:main:train"])
    assert [Path(name).name for name in found] == [
        "part-01.jsonl",
        "part-02.jsonl",
        "part-10.jsonl",
        "name:main:train",
    ]
    with pytest.raises(UserError, match="no file fits this pattern"):
        expand(str(tmp_path / "*.csv"))
    with pytest.raises(UserError, match=r"a folder; name the files in it, e.g. .*/\*.jsonl"):
        check_source("data.train", str(tmp_path), DATA)


def test_the_same_rows_come_from_every_format(tmp_path: Path, write_rows) -> None:
    raw = [{"prompt": f"q, {n}", "completion": f'a "{n}"\nb'} for n in range(3)]
    expected = messages(write_rows(*raw))
    (tmp_path / "r.json").write_text(json.dumps(raw))
    for name in ("lines.json", "r.ndjson", "r.JSONL"):
        (tmp_path / name).write_bytes((tmp_path / "rows.jsonl").read_bytes())
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / "r.parquet")
    import csv

    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, raw[0])
        writer.writeheader()
        writer.writerows(raw)
    for name, content in (("r.jsonl", "rows.jsonl"), ("r.json", "r.json"), ("r.csv", "r.csv")):
        plain = (tmp_path / content).read_bytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain))
        with pa.CompressedOutputStream(str(tmp_path / f"{name}.zst"), "zstd") as stream:
            stream.write(plain)
    packed = [path.name for path in tmp_path.iterdir() if path.suffix in {".gz", ".zst"}]
    plain = ["r.json", "r.parquet", "r.csv", "lines.json", "r.ndjson", "r.JSONL"]
    for name in (*plain, *packed):
        assert messages(str(tmp_path / name)) == expected, name
    assert len(packed) == 6


def test_a_csv_row_with_too_many_cells_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text("prompt,completion\na,b\na,b,c\n")
    with pytest.raises(UserError, match=r"r.csv:3: more cells than the header"):
        check_source("data.train", str(file), DATA)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("r.parquet", b"PAR1 not really", ": cannot be read: Parquet magic bytes not found"),
        ("r.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], ": cannot be read: Truncated compressed stream"),
        ("r.jsonl.gz", b"{}", ": cannot be read: zlib inflate failed"),
        ("r.json", b'[{"text": "a"},\n{]', ":2: cannot be read: not valid JSON"),
        ("r.json", b"[" * 100_000, ": cannot be read: lists or objects nested too deeply"),
        ("r.csv", "prompt,completion\ncaf\xe9,a\n".encode("latin1"), ": cannot be read: not UTF-8"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        check_source("data.train", str(file), DATA)
    assert str(error.value).startswith(f"{file}{problem}")


def test_a_parquet_column_that_python_cannot_hold_is_not_read(tmp_path: Path) -> None:
    far = pa.array([2**62, 0], pa.timestamp("us"))  # after the year 9999
    nowhere = pa.array([0, 0], pa.timestamp("us", tz="Not/AZone"))
    text = pa.array(["one", "two"])
    pq.write_table(pa.table({"text": text, "far": far, "nowhere": nowhere}), tmp_path / "r.parquet")
    assert [row["text"] for row in read_rows(str(tmp_path / "r.parquet"), DATA)] == ["one", "two"]


def test_a_file_that_exists_is_no_pattern(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("rows [1].jsonl", "what?.jsonl", "all*.jsonl")]
    for name in names:
        Path(name).write_text(json.dumps(GOOD))
    assert expand(names) == names
    assert all(messages(name) == [GOOD["messages"]] for name in names)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": {"a": 1}}},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "assistant", "tool_calls": {"name": "f", "arguments": {"a": 1}}},
        {"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {"a": 1}}]'},
        {"role": "assistant", "tool_calls": [{"function": '{"name": "f", "arguments": {"a": 1}}'}]},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ],
)  # fmt: skip
def test_a_call_of_a_tool_is_read_from_each_form(write_rows, turn: dict) -> None:
    (row,) = read_rows(write_rows({"messages": [*ASKED, turn]}), DATA)
    assert row["messages"][1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    ]


def test_an_empty_argument_leaves_the_other_calls_as_they_are(write_rows) -> None:
    calls = [{"function": {"name": "f", "arguments": text}} for text in ("", '{"a": 1}')]
    calls.append({"function": {"name": "f"}})
    turn = {"role": "assistant", "tool_calls": calls}
    (row,) = read_rows(write_rows({"messages": [*ASKED, turn]}), DATA)
    found = [call["function"]["arguments"] for call in row["messages"][1]["tool_calls"]]
    assert found == [{}, {"a": 1}, {}]


def test_a_rejected_answer_is_left_out(write_rows) -> None:
    tally = Tally()
    row = {"prompt": "q", "completion": "a", "label": False}
    assert not list(read_rows(write_rows(row), DATA, tally))
    assert "was rejected" in tally.empty[0]["reason"]


def test_parquet_does_not_fill_the_keys_of_other_rows(tmp_path: Path) -> None:
    tools = [
        [{"type": "function", "function": {"name": n, "parameters": {n: {"a": 1}}}}] for n in "xy"
    ]
    calls = [[{"function": {"name": n, "arguments": {n: 1}}}] for n in "xy"]
    turns = [[*ASKED, {"role": "assistant", "content": "", "tool_calls": call}] for call in calls]
    table = pa.Table.from_pylist(
        [{"messages": m, "tools": t} for m, t in zip(turns, tools, strict=True)]
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    for row, tool, name in zip(
        read_rows(str(tmp_path / "rows.parquet"), DATA), tools, "xy", strict=True
    ):
        assert row["tools"] == tool
        assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {name: 1}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('prompt,completion\na,b\nc,"d\ne,f\n', ":3: not valid CSV from this line on"),
        ("prompt,completion,prompt\na,b,c\n", ":1: two columns are called prompt"),
    ],
)
def test_a_csv_that_means_something_else_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError) as error:
        list(read_rows(str(tmp_path / "rows.csv"), DATA))
    assert problem in error.value.problems[0]


@pytest.mark.parametrize(
    ("key", "value", "fine"),
    [("weight", 0.0, True), ("train", False, True), ("trainable", 1, True),
     ("weight", "0", False), ("train", "false", False), ("weight", 0.5, False)],
)  # fmt: skip
def test_a_mark_of_what_carries_loss_is_read_or_refused(write_rows, key, value, fine) -> None:
    answer = {"role": "assistant", "content": "a", key: value}
    row = {"messages": [{"role": "user", "content": "q"}, answer, answer | {key: 1}]}
    source, config = write_rows(row), DataConfig(train="-")
    if fine:
        ((*_, first, second),) = [each["messages"] for each in read_rows(source, config)]
        assert (trains(first), trains(second)) == (value == 1, True)
    else:
        with pytest.raises(UserError, match=rf":1: .*`{key}` must be 0 or 1, or true or false"):
            list(read_rows(source, config))
