"""Tokens of many rows, of the hub, and on a disk that is full."""

import errno
from pathlib import Path

import datasets
import pytest

from conftest import chat, tokens
from src.config import DataConfig
from src.data import dataset
from src.data.dataset import read_part
from src.utils.errors import RunError, UserError


def test_rows_added_to_many_move_no_other_row_to_the_other_part(write_rows, monkeypatch) -> None:
    monkeypatch.setattr(dataset, "MANY", 50)
    rows = [chat(f"q{n}", f"a{n}") for n in range(80)]
    added = [chat("new", f"{n}") for n in range(9)]
    few, more = write_rows(*rows), write_rows(*added, *rows, name="more.jsonl")
    said = [
        [row["messages"] for row in read_part([file], DataConfig(train=file, eval=0.2), "eval")]
        for file in (few, more)
    ]
    assert said[0] == [messages for messages in said[1] if messages[0]["content"] != "new"]


def test_tokens_that_cannot_be_written_whole_leave_nothing(
    tokenizer, write_rows, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    bad = write_rows(*[chat("q", "a")] * 1500, {"text": 5})  # the first batch is written by then
    with pytest.raises(UserError, match="`text` must be text"):
        tokens(bad, tokenizer, max_length=64)

    def fails(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset, "write_text", fails)
    with pytest.raises(RunError, match="cannot be written: No space left on device; HF_HOME"):
        tokens(write_rows(chat("q", "a")), tokenizer, max_length=64)
    left = [path.name for path in (tmp_path / "tokens").iterdir()]
    assert all(name.endswith(".lock") for name in left), left


def test_rows_of_the_hub_are_tokenised_once_and_a_missing_dataset_is_one_line(
    tokenizer, monkeypatch
) -> None:
    with pytest.raises(
        UserError, match=r"some/where: .*Couldn't reach .*Offline.*; a private one needs HF_TOKEN"
    ):
        tokens("some/where", tokenizer, max_length=64)
    rows = datasets.Dataset.from_list([chat("q", "a"), chat("r", "b")])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    for source, names in (("some/where:test", ()), ("some/where:main:test", ("main",))):
        assert len(tokens(source, tokenizer, max_length=64)) == 2
        assert asked[-1] == (("some/where", *names), {"split": "test"})
    monkeypatch.setattr(dataset, "read_rows", None)
    assert len(tokens("some/where:test", tokenizer, max_length=64)) == 2
