"""What people read of a run is there, whole, and true."""

import json
import shlex
import shutil
from pathlib import Path

import scripts.inference
from conftest import SMOKE, chat, metrics
from src.config import load_config
from src.training import loss as loss_module
from src.training.metrics import draw_curves, rewind_metrics
from src.training.report import summarise


def test_a_run_leaves_what_it_promises(smoke: Path) -> None:
    assert {p.name for p in smoke.iterdir()} == {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "checkpoints", "final",
        "record.json",
    }  # fmt: skip
    assert load_config(smoke / "config.yaml")[0].output_dir == str(smoke)
    lines = metrics(smoke)
    wanted = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert all(wanted <= line.keys() for line in lines)
    assert [line["step"] for line in lines] == list(range(10, 161, 10))
    assert {"eval_loss", "perplexity"} <= lines[-1].keys()
    assert lines[0]["loss"] > 5 > 0.1 > lines[-1]["loss"]
    assert lines[-1]["tokens"] == 1844 * 40
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    assert (smoke / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_were_cut_or_left_out_are_counted_before_step_1(train, write_rows, capsys):
    rows = [chat("q", "a"), chat("q", "word " * 60), chat("long " * 60, "a")]
    train(
        f"data.train={write_rows(*rows)}", "data.eval=null", "data.max_length=64",
        "training.max_steps=1",
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert "\n           read 3 as messages\n" in shown
    assert "\n           2 rows cut: longer than data.max_length=64\n" in shown
    assert "\n           1 row left out: no answer within data.max_length=64\n" in shown
    train("data.eval=null", "training.max_steps=1", output="whole")
    shown = capsys.readouterr().out
    assert "rows cut" not in shown
    assert "left out" not in shown


def test_rows_that_were_left_out_as_unusable_are_kept_with_the_run(train, write_rows, capsys):
    rows = write_rows(*(chat(f"q{n}", "a") for n in range(40)), {"x": 1}, chat("q", ""), "{")
    folder = train(
        f"data.train={rows}", "data.eval=null", "data.bad_rows=skip", "training.max_steps=1"
    )
    shown = capsys.readouterr().out
    assert "2 rows left out as unusable: left_out.jsonl says why" in shown
    assert "1 row left out: nothing to learn from" in shown
    half = train(
        f"data.train={rows}", "data.eval=0.5", "data.bad_rows=skip", "training.max_steps=1",
        output="half",
    )  # fmt: skip
    assert (half / "left_out.jsonl").read_bytes() == (folder / "left_out.jsonl").read_bytes()
    kept = [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]
    assert [each["place"] for each in kept] == [f"{rows}:41", f"{rows}:42", f"{rows}:43"]


def test_a_run_whose_last_steps_were_all_skipped_ends_with_a_summary(train, monkeypatch, capsys):
    loss = loss_module.summed_loss
    monkeypatch.setattr(loss_module, "summed_loss", lambda *args: loss(*args) * float("nan"))
    folder = train("training.on_non_finite=skip", "training.max_steps=2", "data.eval=null")
    assert "done       2 steps, loss not finite" in capsys.readouterr().out
    (line,) = metrics(folder)
    assert (line["loss"], line["skipped_steps"]) == (None, 2)
    assert (folder / "loss.png").is_file()


def test_metrics_are_rewound_to_a_step_past_a_line_that_a_crash_has_cut(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 2}\n{"step": 4, "answer": "one line\u2028to JSON, two to Python"}\n'
    path.write_text(whole + '{"step": 6}\n{"step": 8, "lo')
    rewind_metrics(path, 4)
    assert path.read_text() == whole


def test_a_finished_checkpoint_resumed_in_a_new_folder_ends_with_a_result(train, capsys) -> None:
    once = ["training.max_steps=1", "data.eval=null"]
    checkpoint = train(*once) / "checkpoints/step-00000001"
    capsys.readouterr()
    folder = train(*once, f"training.resume={checkpoint}", output="again")
    shown = capsys.readouterr().out
    assert "done       nothing was left to train\n" in shown
    assert "final: step 1 of 1, the last step\n" in shown
    assert "curve " not in shown
    assert (folder / "final").is_dir()


def test_the_next_command_asks_as_the_run_was_trained(train, write_rows, capsys) -> None:
    short = ("data.eval=null", "training.max_steps=1")
    train(*short)
    assert 'final "your question"\n' in capsys.readouterr().out
    train(*short, f"data.train={write_rows({'text': 'some text'})}", output="text")
    printed = capsys.readouterr().out
    assert 'final --raw "a beginning"\n' in printed
    *_, command = printed.strip().partition("scripts/inference.py ")
    scripts.inference.main([*shlex.split(command), "--max-length", "2"])


def test_a_loss_that_is_not_finite_is_read_back_as_such(smoke: Path, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(smoke, tmp_path / "run"))
    *lines, last = metrics(folder)
    text = [json.dumps(line) + "\n" for line in [*lines, last | {"loss": None, "eval_loss": None}]]
    (folder / "metrics.jsonl").write_text("".join(text))
    summarise(load_config(SMOKE, [f"output_dir={folder}", "tracking.enabled=false"])[0], "", False)
    assert (
        "done       160 steps, loss not finite, evaluation not finite\n" in capsys.readouterr().out
    )
    draw_curves([folder], tmp_path / "loss.png")
