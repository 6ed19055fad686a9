"""What people read of a run is there, whole, and true."""

import json
import shlex
from pathlib import Path

import scripts.inference
from conftest import chat, metrics
from src.config import load_config
from src.training import loss as loss_module
from src.training.record import drop_lines_after


def test_a_run_leaves_what_it_promises(smoke: Path) -> None:
    # Where the project has changes that are not committed, it also holds their diff.
    assert {p.name for p in smoke.iterdir()} - {"uncommitted.diff"} == {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "checkpoints", "final",
        "record.json",
    }  # fmt: skip
    assert load_config(smoke / "config.yaml").output_dir == str(smoke)
    lines = metrics(smoke)
    always = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert all(always <= line.keys() for line in lines)
    assert [line["step"] for line in lines] == list(range(10, 161, 10))
    assert {"eval_loss", "perplexity"} <= lines[-1].keys()
    assert lines[0]["loss"] > 5 > 0.1 > lines[-1]["loss"]
    assert lines[-1]["tokens"] == 1844 * 40
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert (smoke / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_were_cut_or_left_out_are_counted_and_kept(train, write_rows, capsys) -> None:
    cut, nothing_left = chat("q", "word " * 60), chat("long " * 60, "a")
    usable = [chat(f"q{n}", "a") for n in range(9)]
    path = write_rows(*usable, cut, nothing_left, {"x": 1}, chat("q", ""), "{")
    options = ["data.bad_rows=skip", "data.max_length=64", "training.max_steps=1"]
    folder = train(f"data.train={path}", "data.eval=0.4", *options)
    printed = capsys.readouterr().out
    assert "2 rows left out as unusable (see left_out.jsonl of a run)" in printed
    assert "left out: nothing to learn from" in printed
    kept = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    places = [each["place"] for each in kept]
    assert sorted(places) == [f"{path}:{line}" for line in (11, 12, 13, 14)], "each of them once"
    train(f"data.train={path}", f"data.eval={path}", *options, output="same")
    printed = capsys.readouterr().out
    assert "           to evaluate on: 10 (the same rows)\n" in printed
    assert "           1 row cut: longer than data.max_length=64\n" in printed


def test_a_run_whose_steps_were_all_skipped_writes_null_and_draws_its_curve(train, monkeypatch):
    loss = loss_module.summed_loss
    monkeypatch.setattr(loss_module, "summed_loss", lambda *args: loss(*args) * float("nan"))
    folder = train("training.on_non_finite=skip", "training.max_steps=2")
    (line,) = metrics(folder)
    assert (line["loss"], line["eval_loss"], line["skipped_steps"]) == (None, None, 2)
    assert (folder / "loss.png").is_file()


def test_metrics_are_rewound_to_a_step_past_a_line_that_a_crash_has_cut(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 2}\n{"step": 4, "answer": "one line\u2028to JSON, two to Python"}\n'
    path.write_text(whole + '{"step": 6}\n{"step": 8, "lo')
    drop_lines_after(path, 4)
    assert path.read_text() == whole


def test_a_finished_checkpoint_resumed_in_a_new_folder_ends_with_a_result(train, capsys) -> None:
    once = ["training.max_steps=1", "data.eval=null"]
    checkpoint = train(*once) / "checkpoints/step-00000001"
    assert 'final "your question"\n' in capsys.readouterr().out
    folder = train(*once, f"training.resume={checkpoint}", output="again")
    printed = capsys.readouterr().out
    assert "finished   nothing is left to train; to go on, raise" in printed
    assert "final: step 1 of 1, the last step\n" in printed
    assert (folder / "final").is_dir()


def test_the_next_command_asks_for_a_continuation_after_text_alone(train, write_rows, capsys):
    text = f"data.train={write_rows({'text': 'some text'})}"
    train(text, "data.eval=null", "training.max_steps=1")
    printed = capsys.readouterr().out
    assert 'final --raw "a beginning"\n' in printed
    *_, command = printed.strip().partition("scripts/inference.py ")
    scripts.inference.main([*shlex.split(command), "--max-length", "2"])
