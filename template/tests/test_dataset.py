"""Rows are tokenised once, whole or not at all, and read back as they were."""

import copy
import errno
import pickle
from pathlib import Path

import datasets
import pytest

from conftest import chat
from src.data import dataset
from src.data.dataset import load_tokens
from src.data.rows import FIRST_ROWS, check_source
from src.utils.errors import RunError, UserError


def test_truncation_is_counted_and_rows_without_labels_are_left_out(tokenizer, write_rows) -> None:
    rows = [chat("q", "a"), chat("q", "word " * 60), chat("long " * 60, "a")]
    data = load_tokens(write_rows(*rows), tokenizer, max_length=64)
    assert (len(data), data.truncated, data.dropped) == (2, 2, 1)
    assert data.lengths.tolist()[1] == 64
    with pytest.raises(UserError, match=r"nothing to learn from: in all 1 rows"):
        load_tokens(write_rows(rows[2], name="long.jsonl"), tokenizer, max_length=64)


def test_tokens_are_reused_until_rows_template_length_or_code_change(
    tokenizer, write_rows, monkeypatch
) -> None:
    calls = []
    real = dataset.encode
    monkeypatch.setattr(dataset, "encode", lambda *a, **k: calls.append(1) or real(*a, **k))
    file = write_rows(chat("q", "a"), chat("r", "b"))
    for expected, changed in [(1, 64), (1, 64), (2, 65)]:
        load_tokens(file, tokenizer, max_length=changed)
        assert len(calls) == expected
    write_rows(chat("q", "other"))
    load_tokens(file, tokenizer, max_length=64)
    assert len(calls) == 3
    other = copy.copy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("Assistant", "Answer")
    load_tokens(file, other, max_length=64)
    assert len(calls) == 4
    monkeypatch.setattr(dataset, "CODE", ("rows.py",))  # as if encoding.py had other lines
    load_tokens(file, tokenizer, max_length=64)
    assert len(calls) == 5


def test_a_bad_row_that_no_early_check_reads_is_named_when_it_is_tokenised(
    tokenizer, write_rows
) -> None:
    file = write_rows(*[chat("q", "a")] * FIRST_ROWS, {"text": 5}, chat("q", "a"), "{not json")
    check_source("data.train", file)
    with pytest.raises(UserError) as error:
        load_tokens(file, tokenizer, max_length=64)
    number, text = FIRST_ROWS + 1, "`text` must be text, not a number"
    assert error.value.problems[0] == f"{file}:{number}: {text}"
    assert error.value.problems[1].startswith(f"{file}:{number + 2}: not valid JSON")


def test_the_fingerprint_is_that_of_the_tokens_alone(tokenizer, write_rows) -> None:
    one = load_tokens(write_rows(chat("q", "a")), tokenizer, max_length=64)
    same = load_tokens(write_rows("", chat("q", "a"), name="b.jsonl"), tokenizer, max_length=65)
    other = load_tokens(write_rows(chat("q", "b"), name="c.jsonl"), tokenizer, max_length=64)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_tokens_that_cannot_be_written_whole_leave_nothing(
    tokenizer, write_rows, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    bad = write_rows(*[chat("q", "a")] * 1500, {"text": 5})  # the first batch is written by then
    with pytest.raises(UserError, match="`text` must be text"):
        load_tokens(bad, tokenizer, max_length=64)

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset, "write_text", fails)
    with pytest.raises(RunError, match="cannot be written: No space left on device; HF_HOME"):
        load_tokens(write_rows(chat("q", "a")), tokenizer, max_length=64)
    left = [path.name for path in (tmp_path / "tokens").iterdir()]
    assert all(name.endswith(".lock") for name in left), left


def test_workers_map_the_tokens_again(tokenizer, write_rows) -> None:
    data = load_tokens(write_rows(*[chat("q", "a " * 20)] * 500), tokenizer, max_length=64)
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000, "a copy of all tokens for each worker"
    again = pickle.loads(pickled)
    for document, same in zip(data[[3, 7]], again[[3, 7]], strict=True):
        assert document.row == same.row
        assert (document.input_ids == same.input_ids).all()
        assert (document.labels == same.labels).all()


def test_rows_of_the_hub_are_tokenised_once_and_a_missing_dataset_is_one_line(
    tokenizer, monkeypatch
) -> None:
    with pytest.raises(UserError, match=r"some/where: not found on the hub and not in its cache"):
        load_tokens("some/where", tokenizer, max_length=64)
    rows = datasets.Dataset.from_list([chat("q", "a"), chat("r", "b")])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    data = load_tokens("some/where:test", tokenizer, max_length=64)
    assert len(data) == 2
    assert asked[0] == (("some/where",), {"split": "test"})
    monkeypatch.setattr(dataset, "read_rows", None)
    assert len(load_tokens("some/where:test", tokenizer, max_length=64)) == 2
