"""The story of a run: train, look at what is left, ask; stop, resume, ask again."""

import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

import scripts.inference
import scripts.train
from conftest import ROOT, SMOKE, chat, metrics
from src.training import loss as loss_module
from src.training import run, trainer
from src.utils.errors import RunError

QUESTION = "What does LoRA train?"
ANSWER = "Two small matrices per layer, whose product is added to the frozen weight."
NO_EVAL = "data.eval=null"


def test_the_smoke_run_memorises_its_sample_and_answers(smoke: Path, capsys) -> None:
    scripts.inference.main([str(smoke / "final"), QUESTION, "Say hello."])
    assert capsys.readouterr().out.splitlines() == [ANSWER, "Hello! I am a very small model."]


@pytest.mark.slow
def test_qlora_on_a_saved_model_trains_and_its_adapter_answers(smoke, train, capsys, write_rows):
    rows = write_rows(*[chat(f"What is the code of {n}?", "It is seven.") for n in "abcd"])
    folder = train(
        f"model.name={smoke / 'final'}", "model.init=pretrained", "model.quantization=4bit",
        "model.dtype=bf16", "lora.r=8", f"data.train={rows}", NO_EVAL,
        "training.learning_rate=1e-2", "training.epochs=30", "training.batch_size=1",
    )  # fmt: skip
    assert metrics(folder)[-1]["loss"] < 0.1 * metrics(folder)[0]["loss"]
    assert (folder / "final/adapter_config.json").is_file()
    capsys.readouterr()
    scripts.inference.main([str(folder / "final"), "What is the code of a?"])
    assert capsys.readouterr().out.strip() == "It is seven."


# 8-bit AdamW's weights are bf16, rounded stochastically.
RESUMED = {
    "all weights": [],
    "8-bit AdamW": ["training.optimizer=adamw8bit", "model.dtype=bf16"],
    "lora": ["model.name={smoke}/final", "model.init=pretrained", "lora.dropout=0.1"],
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "all weights")) for k in RESUMED]
)
def test_a_stopped_run_ends_in_the_same_weights_as_one_that_was_not(smoke, train, kind) -> None:
    options = ["training.max_steps=6", "training.save_every=3", "training.batch_size=1"]
    options += [option.format(smoke=smoke) for option in RESUMED[kind]]
    straight, twice = train(*options, output="straight"), train(*options, output="twice")
    # As if the run had died after its first checkpoint.
    shutil.rmtree(twice / "checkpoints/step-00000006")
    shutil.rmtree(twice / "final")
    train(*options, "training.resume=auto", output="twice")
    (one,), (other,) = (list((f / "final").glob("*.safetensors")) for f in (straight, twice))
    assert one.read_bytes() == other.read_bytes()
    keys = ("step", "loss", "learning_rate", "grad_norm", "tokens")
    first, second = ([{k: m[k] for k in keys} for m in metrics(f)] for f in (straight, twice))
    assert first == second


@pytest.fixture
def poisoned(monkeypatch, write_rows, tokenizer) -> str:
    """Rows of which row 3 makes the loss of its batch NaN."""
    marker = tokenizer("~", add_special_tokens=False)["input_ids"][-1]
    loss = loss_module.summed_loss

    def poison(model, batch, head):
        found = (batch["input_ids"] == marker).any()
        return loss(model, batch, head) * (float("nan") if found else 1.0)

    monkeypatch.setattr(loss_module, "summed_loss", poison)
    rows = [chat(f"How many are {n}?", "~" if n == 3 else "As many as that.") for n in range(30)]
    return f"data.train={write_rows(*rows)}"


def test_a_nan_stops_before_the_step_and_names_the_rows(train, poisoned, monkeypatch) -> None:
    take, weights_after_each = trainer.train_step, []

    def watch(model, *args, **options):
        step = take(model, *args, **options)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        weights_after_each.append((bool(step.finite), weights))
        return step

    monkeypatch.setattr(trainer, "train_step", watch)
    with pytest.raises(RunError, match=r"documents \[.*\b3\b.*\] of the training set") as error:
        train(poisoned, "training.log_every=8", "training.max_steps=8", "data.packing=false")
    assert "training.on_non_finite=skip" in str(error.value)
    first = [finite for finite, _ in weights_after_each].index(False) + 1
    assert str(error.value).startswith(f"step {first}: "), "not the step of the log line"
    good = [weights for finite, weights in weights_after_each if finite]
    bad = [weights for finite, weights in weights_after_each if not finite]
    assert len(good) > 1
    assert len(bad) > 1, "steps between the one that was not finite and the log line"
    assert not torch.equal(good[0], good[-1])
    assert all(torch.equal(weights, good[-1]) for weights in bad), "none of them was taken"


def test_a_nan_can_be_skipped_and_is_counted(train, poisoned) -> None:
    folder = train(poisoned, "training.on_non_finite=skip", "training.epochs=2", NO_EVAL)
    last = metrics(folder)[-1]
    assert last["skipped_steps"] == 2, "once an epoch"
    assert last["loss"] is not None


def test_early_stopping_ends_the_run_and_the_best_checkpoint_stays(train, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5, 2.6, 9.0])
    monkeypatch.setattr(run, "evaluate", lambda *_: next(losses))
    options = ["training.eval_every=2", "training.patience=2", "training.keep_checkpoints=1"]
    folder = train(*options, "training.max_steps=20")
    assert metrics(folder)[-1]["step"] == 8
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008"], "the best, and the last"
    assert (folder / "final").is_dir()
    train(*options, "training.max_steps=20", "training.resume=auto")
    assert "finished   nothing is left to train; to go on" in capsys.readouterr().out
    # In another folder the best one is the best of that folder, and patience begins anew.
    longer = ["training.max_steps=10", f"training.resume={folder}"]
    train(*options, *longer, output="other")
    assert "other/final: step 10 of 10, the best evaluation\n" in capsys.readouterr().out


def test_a_finished_run_can_be_extended_and_its_first_result_stays(train, capsys) -> None:
    cosine = [NO_EVAL, "training.scheduler=cosine", "training.warmup_steps=0"]
    folder = train(*cosine, "training.max_steps=4")
    first = (folder / "final/model.safetensors").read_bytes()
    (folder / "final-step-4").mkdir()
    train(*cosine, "training.max_steps=4", "training.resume=auto")
    assert (folder / "final/model.safetensors").read_bytes() == first, "nothing left to do"
    assert "learning rate jumps" not in capsys.readouterr().out
    train(*cosine, "training.max_steps=8", "training.resume=auto")
    assert "after step 4 the learning rate jumps from 0 to" in capsys.readouterr().out
    assert (folder / "final-step-4.1/model.safetensors").read_bytes() == first
    assert (folder / "final/model.safetensors").read_bytes() != first
    # An earlier step again, with nothing left to train: it is the result, and step 8's is kept.
    eighth = (folder / "final/model.safetensors").read_bytes()
    fourth = f"training.resume={folder / 'checkpoints/step-00000004'}"
    train(*cosine, "training.max_steps=4", fourth)
    assert (folder / "final/model.safetensors").read_bytes() == first
    assert (folder / "final-step-unknown/model.safetensors").read_bytes() == eighth


def test_two_runs_in_one_folder_are_refused_while_the_first_lives(train, refused, tmp_path) -> None:
    with FileLock(tmp_path / ".run.lock"):
        arguments = (SMOKE, f"output_dir={tmp_path / 'run'}", "tracking.enabled=false")
        (line,) = refused(scripts.train.main, *arguments)
    assert "another run is writing to" in line


@pytest.mark.slow
def test_overfitting_a_few_rows_proves_mask_template_and_stop_token(train, capsys) -> None:
    four_rows = ["training.overfit=4", "training.batch_size=2", NO_EVAL]
    train(*four_rows, "training.epochs=120", "training.learning_rate=5e-3")
    assert "overfit    passed" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"overfit not passed: row 1 says 'Two small matrices"):
        train(*four_rows, "training.epochs=1", output="short")


@pytest.mark.slow
def test_sigterm_saves_the_step_and_says_how_to_resume(tmp_path: Path) -> None:
    output, endless = tmp_path / "run", ["training.epochs=10000", "training.save_every=100000"]
    arguments = [SMOKE, f"output_dir={output}", "device=cpu", "tracking.enabled=false", *endless]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train.py"), *arguments, "training.log_every=1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    while process.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    last = metrics(output)[-1]["step"]
    assert f"after step {last} of" in errors
    assert "training.resume=auto" in errors
    assert "Traceback" not in errors
    assert [p.name for p in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"]


def test_no_two_steps_seeds_or_processes_draw_the_same_numbers(monkeypatch) -> None:
    drawn = []
    for seed, step, rank in product((1, 2, 3), range(4), (0, 1)):
        monkeypatch.setattr(run, "RANK", rank)
        config, state = SimpleNamespace(seed=seed), SimpleNamespace(step=step)
        parts: Any = SimpleNamespace(config=config, state=state)
        run._seed_step(parts)
        drawn.append(torch.rand(1).item())
    assert len({*drawn}) == len(drawn)
