"""Files of prompts are answered in order, each once, however often it is stopped."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import scripts.inference
from conftest import ROOT, chat
from src.config import DataConfig
from src.data.answers import answer_rows, check_answers
from src.utils.errors import UserError

DATA = DataConfig(train="-")
HELLO = "Hello! I am a very small model."


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_of_every_shape_are_answered_beside_what_they_were(
    smoke: Path, write_rows, tmp_path
) -> None:
    given = [
        chat("Say hello.", "what was trained is not shown"),
        {"prompt": "Say hello.", "id": 7},
        {"question": "Say hello.", "answer": "kept"},
        {"instruction": "Say", "input": "hello."},
    ]
    output = tmp_path / "out/answers.jsonl"
    scripts.inference.main([
        str(smoke), "--input", write_rows(*given), "--output", str(output), "--max-length", "32"
    ])  # fmt: skip
    answered = rows_of(output)
    assert [{k: v for k, v in row.items() if k != "generated"} for row in answered] == given
    assert [row["generated"] for row in answered[:3]] == [HELLO] * 3


def echo(asked: list[dict]) -> list[str]:
    return [row["messages"][-1]["content"].upper() for row in asked]


def test_a_file_goes_on_after_its_last_whole_line(write_rows, tmp_path) -> None:
    source = write_rows(*[{"prompt": f"row {n}"} for n in range(300)])
    output = tmp_path / "answers.jsonl"
    assert check_answers(source, output, DATA) == (0, 300)
    answer_rows(source, output, DATA, 0, 300, echo)
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) // 2])  # in the middle of a line
    done, total = check_answers(source, output, DATA)
    assert 0 < done < 300 == total
    answer_rows(source, output, DATA, done, total, echo)
    assert output.read_bytes() == whole


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (['{"prompt": "other", "generated": "x"}'], "answers.jsonl:1: no answer to row 1 of"),
        (["not json"], "answers.jsonl:1: no answer to row 1 of"),
        (['{"prompt": "a", "generated": "x"}'] * 3, "has more lines than"),
    ],
)
def test_an_output_of_other_rows_is_left_as_it_is(write_rows, tmp_path, lines, told) -> None:
    source, output = write_rows({"prompt": "a"}), tmp_path / "answers.jsonl"
    output.write_text("".join(f"{line}\n" for line in lines))
    before = output.read_bytes()
    with pytest.raises(UserError, match=told):
        check_answers(source, output, DATA)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", ":2: not valid JSON"),
        ({"answer": "x"}, ":2: `question` is missing; it has `answer`"),
        ({"messages": [{"role": "robot", "content": "x"}]}, ":2: message 1: `role` is 'robot'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, ":2: asks nothing"),
        (["x"], ":2: a row is an object"),
    ],
)
def test_a_row_that_asks_nothing_is_named_before_anything_is_loaded(
    smoke: Path, write_rows, refused, tmp_path, row, told
) -> None:
    row = row if isinstance(row, str) else json.dumps(row)
    source, output = write_rows({"prompt": "a"}, row), tmp_path / "answers.jsonl"
    lines = refused(scripts.inference.main, str(smoke), "--input", source, "--output", str(output))
    assert told in lines[0]
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments", [["a", "--chat"], ["--input", "x"], ["a", "--input", "x", "--output", "y"]]
)
def test_ways_of_asking_exclude_each_other(smoke: Path, refused, arguments) -> None:
    lines = refused(scripts.inference.main, str(smoke), *arguments)
    assert lines == ["give prompts, or --input with --output, or --chat"]


def test_standard_input_is_a_prompt_and_an_empty_one_is_refused(
    smoke: Path, refused, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say hello.\n"))
    scripts.inference.main([str(smoke), "--max-length", "32"])
    assert capsys.readouterr().out.strip() == HELLO
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert refused(scripts.inference.main, str(smoke))[0].startswith("an empty prompt")


def test_a_conversation_streams_its_answers(smoke: Path, monkeypatch, capsys) -> None:
    said = iter(["Say hello.", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    scripts.inference.main([str(smoke), "--chat", "--max-length", "32"])
    assert capsys.readouterr().out.strip() == HELLO


def test_a_checkpoint_answers_as_the_result_that_was_made_of_it(smoke: Path, capsys) -> None:
    last = sorted((smoke / "checkpoints").glob("step-*"))[-1]
    scripts.inference.main([str(last), "Say hello.", "--max-length", "32"])
    assert capsys.readouterr().out.strip() == HELLO


def test_a_damaged_checkpoint_is_refused(smoke: Path, refused, tmp_path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    (last / "weights.safetensors").write_bytes(b"x")
    assert "(checksum)" in refused(scripts.inference.main, str(last), "hi")[0]


@pytest.mark.slow  # it starts twice
def test_a_killed_file_run_goes_on_with_the_same_command(smoke: Path, write_rows, tmp_path) -> None:
    given = [{"prompt": f"Say hello. {n}"} for n in range(600)]
    source, output = write_rows(*given), tmp_path / "answers.jsonl"
    script = [sys.executable, str(ROOT / "scripts/inference.py"), str(smoke), "--max-length", "4"]
    command = [*script, "--input", source, "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not output.exists() or not output.stat().st_size:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < len(rows_of(output)) < 600
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    assert [row["prompt"] for row in rows_of(output)] == [row["prompt"] for row in given]
