"""Files of prompts are answered in order, each once, however often it is stopped."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import scripts.inference
from conftest import ROOT, chat
from src.config import DataConfig
from src.data.answers import answer_rows, check_answers
from src.data.chat import chat_text
from src.models import generation
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
        ({"messages": [{"role": "assistant", "content": "x"}]}, ":2: has no question"),
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


def test_a_system_turn_is_asked_before_prompts_and_in_a_conversation(
    smoke: Path, monkeypatch, capsys, refused
) -> None:
    asked = []

    def record(tokenizer, messages, *rest) -> str:
        asked.append([(m["role"], m["content"]) for m in messages])
        return chat_text(tokenizer, messages, *rest)

    monkeypatch.setattr(generation, "chat_text", record)
    said = iter(["Say hello.", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    short = ["--max-length", "2", "--system", "Be brief."]
    scripts.inference.main([str(smoke), "Say hello.", *short])
    scripts.inference.main([str(smoke), "--chat", *short])
    assert asked == [[("system", "Be brief."), ("user", "Say hello.")]] * 2
    for other in (["q", "--raw"], ["--input", "rows.jsonl", "--output", "answers.jsonl"]):
        assert refused(scripts.inference.main, str(smoke), *other, "--system", "x") == [
            "--system goes with prompts or --chat; rows of --input bring their own"
        ]


def test_a_conversation_shows_special_tokens_but_the_stop_token(capsys, tokenizer) -> None:
    stop, special = tokenizer.eos_token_id, tokenizer.bos_token_id
    hello = tokenizer("hello", add_special_tokens=False)["input_ids"]

    def answer(_: object, streamer: Any) -> str:
        streamer.put(torch.tensor([[1, 2]]))
        for token in [*hello, special, *hello, stop]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return ""

    said = iter(["a question", ""])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda _: next(said))
        scripts.inference._chat(answer, tokenizer, [stop], None)
    assert capsys.readouterr().out == f"hello{tokenizer.bos_token}hello\n"


def test_a_checkpoint_answers_as_the_result_that_was_made_of_it(smoke: Path, capsys) -> None:
    last = sorted((smoke / "checkpoints").glob("step-*"))[-1]
    scripts.inference.main([str(last), "Say hello.", "--max-length", "32"])
    assert capsys.readouterr().out.strip() == HELLO


def test_a_damaged_checkpoint_is_refused(smoke: Path, refused, tmp_path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(smoke, run)
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    next((last / "weights").iterdir()).write_bytes(b"x")
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
