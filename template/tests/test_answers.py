"""Files of prompts are answered in order, each once, however often it is stopped."""

import io
import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

import scripts.inference
from conftest import chat
from src.config import DataConfig
from src.data.answers import answer_rows, check_answers
from src.data.chat import chat_text
from src.models import generation
from src.trained import find_trained
from src.utils.errors import UserError

DATA = DataConfig(train="-")
HELLO = "Hello! I am a very small model."


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_every_shape_are_answered_beside_what_they_were_or_printed(
    smoke: Path, write_rows, tmp_path, capsys
) -> None:
    given = [
        chat("Say hello.", "what was trained is not shown"),
        {"prompt": "Say hello.", "id": 7},
        {"question": "Say hello.", "answer": "kept"},
        {"instruction": "Say", "input": "hello."},
        {"text": "Say"},
    ]
    output = tmp_path / "out/answers.jsonl"
    command = [str(smoke), "--input", write_rows(*given), "--max-length", "32"]
    scripts.inference.main([*command, "--output", str(output)])
    answered = rows_of(output)
    added = {"generated", "generated_by"}
    weights = (smoke / "final/model.safetensors").read_bytes()
    version = sha256(weights[-(2**20) :]).hexdigest()[:8]
    assert [{k: v for k, v in row.items() if k not in added} for row in answered] == given
    assert {row["generated_by"] for row in answered} == {
        f"{smoke / 'final'} {version} max_length=32 top_p=1.0"
    }
    assert [row["generated"] for row in answered[:3]] == [HELLO] * 3
    scripts.inference.main([str(smoke), "Say", "--raw", "--max-length", "32"])
    assert capsys.readouterr().out == answered[4]["generated"] + "\n"
    scripts.inference.main(command)
    assert capsys.readouterr().out == output.read_text()


def test_rows_are_read_with_the_columns_of_the_run_and_may_lack_the_answers(
    write_rows, tmp_path
) -> None:
    data = DataConfig(train="-", columns={"prompt": "ask", "completion": "say"})
    source, output = write_rows({"ask": "a"}, {"ask": "b", "say": "x"}), tmp_path / "answers.jsonl"
    answer_rows(source, output, data, "me", *check_answers(source, output, data, "me"), echo)
    assert [row["generated"] for row in rows_of(output)] == ["A", "B"]


def echo(asked: list[dict]) -> list[str]:
    return [row["messages"][-1]["content"].upper() for row in asked]


def test_a_file_goes_on_after_its_last_whole_line(write_rows, tmp_path) -> None:
    source = write_rows(*[{"prompt": f"row {n}", "none": float("nan")} for n in range(300)])
    output = tmp_path / "answers.jsonl"
    assert check_answers(source, output, DATA, "me") == (0, 300)
    answer_rows(source, output, DATA, "me", 0, 300, echo)
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])  # in the middle of a line
    done, total = check_answers(source, output, DATA, "me")
    assert 0 < done < 300 == total
    answer_rows(source, output, DATA, "me", done, total, echo)
    assert output.read_bytes() == whole


NOT_MINE = "answers.jsonl:1: not the answer of me to row 1 of"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('{"prompt": "other", "generated_by": "me", "generated": "x"}\n', NOT_MINE),
        ('{"prompt": "a", "generated_by": "another", "generated": "x"}\n', NOT_MINE),
        ("not json\n", NOT_MINE),
        ("my only copy", NOT_MINE),
        ('{"prompt": "a", "generated_by": "me", "generated": "x"}\n' * 3, "more lines than"),
    ],
)
def test_an_output_of_other_rows_is_left_as_it_is(write_rows, tmp_path, lines, told) -> None:
    source, output = write_rows({"prompt": "a"}), tmp_path / "answers.jsonl"
    output.write_text(lines)
    before = output.read_bytes()
    with pytest.raises(UserError, match="is the input"):
        check_answers(source, Path(source), DATA, "me")
    with pytest.raises(UserError, match=told):
        check_answers(source, output, DATA, "me")
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", ":2: not valid JSON"),
        ('{"prompt": "a", "id": "\\ud800"}', ":2: 'utf-8' codec can't encode"),
        ('{"answer": "x"}', ":2: has ['answer']; a row needs"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', ":2: has no question"),
        ('["x"]', ":2: a row must be an object"),
    ],
)
def test_a_row_that_asks_nothing_is_named_before_anything_is_loaded(
    smoke: Path, write_rows, refused, tmp_path, row: str, told: str
) -> None:
    source, output = write_rows({"prompt": "a"}, row), tmp_path / "answers.jsonl"
    lines = refused(scripts.inference.main, str(smoke), "--input", source, "--output", str(output))
    assert told in lines[0]
    assert not output.exists()


def test_prompts_standard_input_and_a_conversation_are_answered_after_a_system_turn(
    smoke: Path, monkeypatch, capsys
) -> None:
    asked = []

    def record(tokenizer, messages, *rest) -> str:
        asked.append([(m["role"], m["content"]) for m in messages])
        return chat_text(tokenizer, messages, *rest)

    monkeypatch.setattr(generation, "chat_text", record)
    for system in ([], ["--system", "Be brief."]):
        said = iter(["Say hello.", ""])
        monkeypatch.setattr("builtins.input", lambda _, said=said: next(said))
        monkeypatch.setattr("sys.stdin", io.StringIO("Say hello.\n"))
        for words in ([], ["--chat"]):
            scripts.inference.main([str(smoke), *words, "--max-length", "32", *system])
    assert capsys.readouterr().out.startswith(f"{HELLO}\n{HELLO}\n")
    turns = [[("user", "Say hello.\n")], [("user", "Say hello.")]]
    assert asked == [*turns, *([("system", "Be brief."), *turn] for turn in turns)]


def test_a_checkpoint_answers_as_the_result_that_was_made_of_it_unless_it_is_damaged(
    smoke: Path, capsys, refused, tmp_path
) -> None:
    last = sorted(shutil.copytree(smoke, tmp_path / "run").glob("checkpoints/step-*"))[-1]
    scripts.inference.main([str(last), "Say hello.", "--max-length", "32"])
    assert capsys.readouterr().out.strip() == HELLO
    read = find_trained(str(last)).config
    assert read == find_trained(str(smoke)).config, "rows to answer are read as the run did"
    next((last / "weights").iterdir()).write_bytes(b"x")
    assert "(checksum)" in refused(scripts.inference.main, str(last), "hi")[0]
