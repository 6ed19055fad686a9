"""Rows are tokenised once, whole or not at all, and read back as they were."""

import copy
import errno
import pickle
from pathlib import Path

import datasets
import pytest

from conftest import chat, tokens
from src.config import DataConfig
from src.data import dataset
from src.data.dataset import evaluation_limit, load_tokens
from src.data.rows import FIRST_ROWS, check_source
from src.utils.errors import RunError, UserError


def test_truncation_is_counted_and_rows_without_labels_are_left_out(tokenizer, write_rows) -> None:
    rows = [chat("q", "a"), chat("q", "word " * 60), chat("long " * 60, "a")]
    data = tokens(write_rows(*rows), tokenizer, max_length=64)
    assert (len(data), data.facts.truncated, data.facts.dropped) == (2, 2, 1)
    assert data.lengths.tolist()[1] == 64
    with pytest.raises(UserError, match=r"nothing to learn from: in all rows"):
        tokens(write_rows(rows[2], name="long.jsonl"), tokenizer, max_length=64)


def test_a_longer_conversation_is_left_out_if_wanted(tokenizer, write_rows) -> None:
    file = write_rows(chat("q", "a"), chat("q", "word " * 60))
    data = tokens(file, tokenizer, max_length=64, too_long="drop")
    assert (len(data), data.facts.truncated) == (1, 1)


def test_a_longer_text_becomes_documents_and_loses_nothing(tokenizer, write_rows) -> None:
    text = " ".join(f"word{n}" for n in range(100))
    data = tokens(write_rows({"text": text}, {"text": "short"}), tokenizer, max_length=64)
    assert data.facts.split == 1
    *pieces, short = data[list(range(len(data)))]
    assert len(pieces) > 2
    assert all(len(piece.input_ids) <= 64 for piece in pieces)
    ids = [i for piece in pieces for i in piece.input_ids.tolist()]
    assert tokenizer.decode(ids) == f"{text}<|end|>"
    assert tokenizer.decode(short.input_ids.tolist()) == "short<|end|>"


def test_a_share_for_evaluation_is_chosen_by_content(tokenizer, write_rows) -> None:
    rows = [chat(f"q{n}", f"a{n}") for n in range(200)]
    file = write_rows(*rows, *rows[:50])  # with duplicates
    data = DataConfig(train=file, eval=0.2, max_length=64)

    def contents(part) -> list[tuple]:
        found = load_tokens(file, tokenizer, data, part=part)
        return [tuple(d.input_ids.tolist()) for d in found[list(range(len(found)))]]

    train, evaluation = contents("train"), contents("eval")
    assert len(train) + len(evaluation) == 250
    assert not set(train) & set(evaluation)
    assert 25 < len(evaluation) < 75
    alone = write_rows(chat("q", "a"), name="alone.jsonl")
    with pytest.raises(UserError, match=r"data.eval=0.2 leaves too few rows"):
        [load_tokens(alone, tokenizer, data, part=part) for part in ("train", "eval")]
    facts = load_tokens(file, tokenizer, data, part="eval").facts
    assert facts.read_as == {"messages": len(evaluation)}, "and not the rows of both parts"


@pytest.mark.parametrize(("rows", "share", "held"), [(60, 0.1, 6), (12, 0.1, 1), (3, 0.5, 2)])
def test_a_share_of_few_rows_is_met_within_one_row(
    tokenizer, write_rows, rows: int, share: float, held: int
) -> None:
    file = write_rows(*[chat(f"q{n}", f"a{n}") for n in range(rows)])
    data = DataConfig(train=file, eval=share, max_length=64)
    parts = [len(load_tokens(file, tokenizer, data, part=part)) for part in ("train", "eval")]
    assert parts == [rows - held, held]


def test_rows_added_to_many_move_no_other_row_to_the_other_part(write_rows, monkeypatch) -> None:
    monkeypatch.setattr(dataset, "MANY", 50)
    rows = [chat(f"q{n}", f"a{n}") for n in range(80)]
    few, more = (
        write_rows(*rows),
        write_rows(*[chat("new", f"{n}") for n in range(9)], *rows, name="m.jsonl"),
    )
    data = DataConfig(train=few, eval=0.2)
    assert evaluation_limit([few], data) == evaluation_limit([more], data)


def test_several_sources_are_read_one_after_the_other(tokenizer, write_rows) -> None:
    one, two = write_rows(chat("q", "a")), write_rows(chat("r", "b"), name="two.jsonl")
    data = load_tokens([one, two], tokenizer, DataConfig(train=[one, two], max_length=64))
    alone = tokens(two, tokenizer, max_length=64)
    assert data[[1]][0].input_ids.tolist() == alone[[0]][0].input_ids.tolist()


def test_rows_that_the_template_refuses_are_named_or_left_out(tokenizer, write_rows) -> None:
    other = copy.deepcopy(tokenizer)
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    other.chat_template = refuse + tokenizer.chat_template
    system = {"messages": [{"role": "system", "content": "s"}, *chat("q", "a")["messages"]]}
    file = write_rows(chat("q", "a"), system)
    with pytest.raises(UserError) as error:
        tokens(file, other, max_length=64)
    assert error.value.problems == (f"{file}:2: the chat template refuses it: no system",)
    data = tokens(file, other, max_length=64, bad_rows="skip")
    assert (len(data), data.facts.unusable) == (1, 1)
    with pytest.raises(UserError) as error:
        tokens(write_rows(*[system] * 30, name="all.jsonl"), other, max_length=64)
    (problem,) = error.value.problems
    assert problem.endswith(
        "all.jsonl:1: the chat template refuses it: no system "
        "(30 rows; data.bad_rows=skip leaves them out)"
    )
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
    assert tokens(file, other, max_length=64).facts.unprompted == 1
    assert tokens(file, tokenizer, max_length=64).facts.unprompted == 0


def test_a_rows_labels_depend_on_nothing_but_the_row(tokenizer, write_rows) -> None:
    rows = [chat("why? " * (n % 5), "because " * (1 + n % 11)) for n in range(30)]
    together = tokens(write_rows(*rows), tokenizer, max_length=64)
    for n in (0, 13, 29):
        alone = tokens(write_rows(rows[n], name=f"{n}.jsonl"), tokenizer, max_length=64)
        assert together[[n]][0].labels.tolist() == alone[[0]][0].labels.tolist()


def test_tokens_are_reused_until_rows_template_length_or_code_change(
    tokenizer, write_rows, monkeypatch
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
    other = copy.copy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("Assistant", "Answer")
    tokens(file, other, max_length=64)
    assert len(calls) == 4
    monkeypatch.setattr(dataset, "CODE", ("rows.py",))  # as if encoding.py had other lines
    tokens(file, tokenizer, max_length=64)
    assert len(calls) == 5


def test_a_bad_row_that_no_early_check_reads_is_named_when_it_is_tokenised(
    tokenizer, write_rows
) -> None:
    file = write_rows(*[chat("q", "a")] * FIRST_ROWS, {"text": 5}, chat("q", "a"), "{not json")
    check_source("data.train", file, DataConfig(train=file))
    with pytest.raises(UserError) as error:
        tokens(file, tokenizer, max_length=64)
    number, text = FIRST_ROWS + 1, "`text` must be text, not a number"
    assert error.value.problems[0] == f"{file}:{number}: {text}"
    assert error.value.problems[1].startswith(f"{file}:{number + 2}: not valid JSON")


def test_the_fingerprint_is_that_of_the_tokens_alone(tokenizer, write_rows) -> None:
    one = tokens(write_rows(chat("q", "a")), tokenizer, max_length=64)
    same = tokens(write_rows("", chat("q", "a"), name="b.jsonl"), tokenizer, max_length=65)
    other = tokens(write_rows(chat("q", "b"), name="c.jsonl"), tokenizer, max_length=64)
    assert one.facts.fingerprint == same.facts.fingerprint != other.facts.fingerprint


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


def test_workers_map_the_tokens_again(tokenizer, write_rows) -> None:
    data = tokens(write_rows(*[chat("q", "a " * 20)] * 500), tokenizer, max_length=64)
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
        tokens("some/where", tokenizer, max_length=64)
    rows = datasets.Dataset.from_list([chat("q", "a"), chat("r", "b")])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows)
    data = tokens("some/where:test", tokenizer, max_length=64)
    assert len(data) == 2
    assert asked[0] == (("some/where",), {"split": "test"})
    tokens("some/where:main:test", tokenizer, max_length=64)
    assert asked[-1] == (("some/where", "main"), {"split": "test"})
    monkeypatch.setattr(dataset, "read_rows", None)
    assert len(tokens("some/where:test", tokenizer, max_length=64)) == 2


def test_a_column_without_a_name_is_named_by_its_number(tmp_path, tokenizer) -> None:
    table = tmp_path / "pandas.csv"
    table.write_text(",prompt,completion\n0,q,a\n")
    facts = load_tokens(str(table), tokenizer, DataConfig(train=str(table))).facts
    assert list(facts.unread) == ["(column 1)"]
