"""Rows are tokenised once, whole or not at all, and read back as they were."""

import copy
import json
import pickle
import shutil
from itertools import chain
from pathlib import Path

import pytest

from conftest import chat, tokens
from src.config import DataConfig
from src.data import dataset
from src.data.dataset import load_tokens, read_part
from src.data.rows import FIRST_ROWS, check_sources
from src.training.report import data_lines
from src.utils.errors import UserError


def documents(data) -> list[list[int]]:
    return [document.input_ids.tolist() for document in data[list(range(len(data)))]]


@pytest.mark.parametrize(
    ("too_long", "left_out", "note"),
    [("cut", [3], "1 row left out: no answer within data.max_length=64"),
     ("drop", [2, 3], "2 rows left out: longer than data.max_length=64")],
)  # fmt: skip
def test_longer_conversations_are_cut_or_left_out_and_counted(
    tokenizer, write_rows, too_long: str, left_out: list[int], note: str
) -> None:
    rows = [chat("q", "a"), chat("q", "word " * 60), chat("long " * 60, "a")]
    source, long = write_rows(*rows), write_rows(rows[2], name="long.jsonl")
    data = tokens(source, tokenizer, max_length=64, too_long=too_long)
    assert data.lengths.tolist()[1:] == [64] * (2 - len(left_out))
    cut = "1 row cut: longer than data.max_length=64"
    assert list(data_lines(data))[2:] == ([cut, note] if too_long == "cut" else [note])
    kept = [json.loads(line) for line in data.left_out.read_text().splitlines()]
    assert [row["place"] for row in kept] == [f"{source}:{n}" for n in left_out]
    reason = note.partition("left out: ")[2]
    with pytest.raises(
        UserError, match=rf"all rows: no row can be used; {long}:1: {reason} \(\d+ tokens"
    ):
        tokens(long, tokenizer, max_length=64, too_long=too_long)


def test_a_longer_text_becomes_documents_and_loses_nothing(tokenizer, write_rows) -> None:
    text = " ".join(f"word{n}" for n in range(100))
    data = tokens(write_rows({"text": text}, {"text": "short"}), tokenizer, max_length=64)
    *pieces, short = documents(data)
    assert list(data_lines(data))[2:] == ["1 row split: longer than data.max_length=64"]
    assert len(pieces) > 2
    assert max(map(len, pieces)) <= 64
    assert tokenizer.decode([*chain.from_iterable(pieces)]) == f"{text}<|end|>"
    assert tokenizer.decode(short) == "short<|end|>"


def test_a_share_for_evaluation_is_chosen_by_content(tokenizer, write_rows) -> None:
    rows = [chat(f"q{n}", f"a{n}") for n in range(200)]
    file = write_rows(*rows, *rows[:50])  # with duplicates
    data = DataConfig(train=file, eval=0.2, max_length=64)
    train, evaluation = (load_tokens(file, tokenizer, data, part=p) for p in ("train", "eval"))
    assert len(train) + len(evaluation) == 250
    assert not {*map(tuple, documents(train))} & {*map(tuple, documents(evaluation))}
    assert 25 < len(evaluation) < 75
    assert evaluation.facts.read_as == {"messages": len(evaluation)}, "not the rows of both parts"
    alone = write_rows(chat("q", "a"), name="alone.jsonl")
    with pytest.raises(UserError, match=r"alone\.jsonl, eval rows: no rows; at least one"):
        [load_tokens(alone, tokenizer, data, part=part) for part in ("train", "eval")]


@pytest.mark.parametrize(("rows", "share", "held"), [(60, 0.1, 6), (12, 0.1, 1), (3, 0.5, 2)])
def test_a_share_of_few_rows_is_met_within_one_row(write_rows, rows, share, held) -> None:
    file = write_rows(*[chat(f"q{n}", f"a{n}") for n in range(rows)])
    data = DataConfig(train=file, eval=share)
    assert len(list(read_part([file], data, "train"))) == rows - held
    assert len(list(read_part([file], data, "eval"))) == held


def test_several_sources_are_read_one_after_the_other(tokenizer, write_rows) -> None:
    one, two = write_rows(chat("q", "a")), write_rows(chat("r", "b"), name="two.jsonl")
    data = load_tokens([one, two], tokenizer, DataConfig(train=[one, two], max_length=64))
    assert documents(data)[1:] == documents(tokens(two, tokenizer, max_length=64))


def test_rows_that_the_template_refuses_are_named_once_or_left_out(tokenizer, write_rows) -> None:
    other = copy.deepcopy(tokenizer)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    other.chat_template = refuse + tokenizer.chat_template
    system = {"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]]}
    file = write_rows(chat("q", "a"), *[system] * 30)
    with pytest.raises(UserError) as error:
        tokens(file, other, max_length=64)
    assert error.value.problems == (
        f"{file}:2: the chat template refuses it: TemplateError: no system "
        "(30 rows; data.bad_rows=skip leaves them out)",
    )
    data = tokens(file, other, max_length=64, bad_rows="skip")
    assert len(data) == 1
    assert "30 rows left out as unusable (see left_out.jsonl of a run)" in list(data_lines(data))
    assert f"{file}:2" in data.left_out.read_text()


def test_answers_that_the_generation_prompt_does_not_lead_to_are_counted(
    tokenizer, write_rows
) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    file = write_rows(chat("q", "a"), chat("q", "<think>hm</think>a"))
    notes = list(data_lines(tokens(file, other, max_length=64)))[1:]
    assert notes[1] == "1 row whose answers lack what the generation prompt ends with, e.g. <think>"
    assert list(data_lines(tokens(file, tokenizer, max_length=64)))[1:] == notes[:1]


def test_a_rows_labels_depend_on_nothing_but_the_row(tokenizer, write_rows) -> None:
    rows = [chat("why? " * (n % 5), "because " * (1 + n % 11)) for n in range(30)]
    together = tokens(write_rows(*rows), tokenizer, max_length=64)
    for n in (0, 13, 29):
        alone = tokens(write_rows(rows[n], name=f"{n}.jsonl"), tokenizer, max_length=64)
        assert together[[n]][0].labels.tolist() == alone[[0]][0].labels.tolist()


def test_tokens_are_reused_until_rows_template_eos_length_or_code_change(
    tokenizer, write_rows, monkeypatch, tmp_path
) -> None:
    calls = []
    real = dataset.encode
    monkeypatch.setattr(dataset, "encode", lambda *a, **k: calls.append(1) or real(*a, **k))
    file = write_rows(chat("q", "a"), chat("r", "b"))
    for expected, changed in [(1, 64), (1, 64), (2, 65)]:
        tokens(file, tokenizer, max_length=changed)
        assert len(calls) == expected
    write_rows(chat("q", "other"))
    tokens(file, tokenizer, max_length=64)
    assert len(calls) == 3
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("Assistant", "Answer")
    other.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokens(file, other, max_length=64)
    assert len(calls) == 4
    other = copy.deepcopy(other)
    other.eos_token = "<|eot|>"  # of one and the same tokenizer.json
    tokens(file, other, max_length=64)
    assert len(calls) == 5
    code = shutil.copytree(Path(dataset.__file__).parent, tmp_path / "code")
    (code / "encoding.py").write_text("# other lines")
    monkeypatch.setattr(dataset, "__file__", str(code / "dataset.py"))
    tokens(file, tokenizer, max_length=64)
    assert len(calls) == 6


def test_a_bad_row_that_no_early_check_reads_is_named_when_it_is_tokenised(
    tokenizer, write_rows
) -> None:
    file = write_rows(*[chat("q", "a")] * FIRST_ROWS, {"text": 5}, chat("q", "a"), "{not json")
    check_sources(file, DataConfig(train=file))
    with pytest.raises(UserError) as error:
        tokens(file, tokenizer, max_length=64)
    number, text = FIRST_ROWS + 1, "`text` must be text, not int"
    assert error.value.problems[0] == f"{file}:{number}: {text}"
    assert error.value.problems[1].startswith(f"{file}:{number + 2}: not valid JSON")


def test_the_fingerprint_is_that_of_the_tokens_alone(tokenizer, write_rows) -> None:
    one = tokens(write_rows(chat("q", "a")), tokenizer, max_length=64)
    same = tokens(write_rows("", chat("q", "a"), name="b.jsonl"), tokenizer, max_length=65)
    other = tokens(write_rows(chat("q", "b"), name="c.jsonl"), tokenizer, max_length=64)
    assert one.facts.fingerprint == same.facts.fingerprint != other.facts.fingerprint


def test_workers_map_the_tokens_again(tokenizer, write_rows) -> None:
    data = tokens(write_rows(*[chat("q", "a " * 20)] * 500), tokenizer, max_length=64)
    pickled = pickle.dumps(data)
    assert len(pickled) < 1000, "a copy of all tokens for each worker"
    for document, same in zip(data[[3, 7]], pickle.loads(pickled)[[3, 7]], strict=True):
        assert document.row == same.row
        assert (document.input_ids == same.input_ids).all()
        assert (document.labels == same.labels).all()


def test_columns_that_are_not_read_are_named(write_rows, tmp_path, tokenizer) -> None:
    row = {"prompt": "q", "completion": "a", "number": 7, "created": "today", "label": True}
    source = write_rows(row, chat("q", "a"))
    data = tokens(source, tokenizer)
    assert data.facts.unread == {"number": 1, "created": 1}
    assert "not read: number, created" in list(data_lines(data))
    mapped = tokens(source, tokenizer, columns={"system": "created"}, bad_rows="skip")
    assert mapped.facts.unread == {"number": 1}
    table = tmp_path / "pandas.csv"
    table.write_text(",prompt,completion\n0,q,a\n")
    assert list(tokens(str(table), tokenizer).facts.unread) == ["(column 1)"]
