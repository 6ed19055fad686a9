"""Each row that training cannot use is named: file, line and reason."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import chat
from src.data.rows import check_source, read_rows
from src.utils.errors import UserError

GOOD = chat("question", "answer")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "a row is an object with `messages`"),
        ("null", "a row is an object"),
        ({"mesages": []}, "has `mesages`; a row needs `messages`"),
        ({"messages": []}, "`messages` must be a list with at least one message"),
        ({"messages": ["hi"]}, "message 1 must be an object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1: `role` is 'bot', not system"),
        ({"messages": [{"role": "user"}]}, "message 1: `content` is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1: `content` must be text, not null"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn from: no assistant"),
        ({"prompt": "x"}, "`completion` is missing"),
        ({"prompt": "x", "completion": 5}, "`completion` must be text, not a number"),
        ({"prompt": "x", "completion": " "}, "`completion` is empty: there is nothing to learn"),
        ({"text": None}, "`text` must be text, not null"),
        ({"text": ""}, "`text` is empty"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_line_and_reason(write_rows, bad, reason: str) -> None:
    file = write_rows(GOOD, "", bad, GOOD)
    with pytest.raises(UserError) as error:
        check_source("data.train", file)
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(f"{file}:3: {reason}"), error.value.problems


def test_all_bad_rows_are_reported_up_to_a_limit(write_rows) -> None:
    with pytest.raises(UserError) as error:
        list(read_rows(write_rows(*[{"x": 1}] * 50)))
    assert len(error.value.problems) == 21


def test_a_byte_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "latin.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b'\n{"text": "caf\xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl:2: not UTF-8"):
        check_source("data.train", str(file))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_an_empty_or_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        check_source("data.train", str(tmp_path / name))
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="no rows"):
        check_source("data.train", str(tmp_path / name))


def test_the_same_rows_come_from_every_format(tmp_path: Path, write_rows) -> None:
    rows = [{"prompt": f"q, {n}", "completion": f'a "{n}"\nb'} for n in range(3)]
    expected = list(read_rows(write_rows(*rows)))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    import csv

    with (tmp_path / "r.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("r.json", "r.parquet", "r.csv"):
        assert list(read_rows(str(tmp_path / name))) == expected, name


def test_a_csv_row_with_too_many_cells_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    file.write_text("prompt,completion\na,b\na,b,c\n")
    with pytest.raises(UserError, match=r"r.csv:3: more cells than the header"):
        check_source("data.train", str(file))


def test_a_broken_parquet_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "r.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a Parquet file"):
        check_source("data.train", str(tmp_path / "r.parquet"))
