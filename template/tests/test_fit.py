"""What happens between steps: guards, evaluation, early stopping, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import scripts.train
from conftest import ROOT, chat
from src.config import load_config
from src.training import fit, trainer
from src.training.advice import next_settings
from src.utils.errors import Interrupted, RunError

SMOKE = str(ROOT / "configs/smoke.yaml")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def poisoned(monkeypatch):
    """Make the loss of each batch that holds row 3 NaN."""
    prepare, loss = trainer._prepare, trainer.summed_loss

    def mark(batch):
        factor = torch.tensor(float("nan") if 3 in batch["rows"] else 1.0)
        return {**prepare(batch), "factor": factor}

    monkeypatch.setattr(trainer, "_prepare", mark)
    monkeypatch.setattr(trainer, "_to_device", lambda batch, _: batch)
    monkeypatch.setattr(trainer, "summed_loss", lambda m, b, head: loss(m, b, head) * b["factor"])


def test_a_nan_stops_before_the_step_and_names_the_rows(train, poisoned, monkeypatch):
    weights = {}
    real = trainer._update

    def watch(optimizer, scaler, finite):
        real(optimizer, scaler, finite)
        if not bool(finite):
            weights.setdefault(
                "at", [p.clone() for g in optimizer.param_groups for p in g["params"]]
            )
            weights["end"] = [p.clone() for g in optimizer.param_groups for p in g["params"]]

    monkeypatch.setattr(trainer, "_update", watch)
    with pytest.raises(RunError, match=r"rows \[.*\b3\b.*\] of data.train") as error:
        train("training.log_every=4", "training.max_steps=8", "data.packing=false")
    assert "training.on_non_finite=skip" in str(error.value)
    assert all(torch.isfinite(p).all() for p in weights["end"])
    pairs = zip(weights["at"], weights["end"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "no later step was taken either"


def test_a_nan_can_be_skipped_and_is_counted(train, poisoned):
    folder = train("training.on_non_finite=skip", "training.epochs=2", "data.eval=null")
    last = metrics(folder)[-1]
    assert last["skipped_steps"] == 2, "once an epoch"
    assert last["loss"] is not None


def test_early_stopping_ends_the_run_and_the_best_checkpoint_stays(train, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7])
    real = fit.evaluate

    def evaluate(*args):
        return trainer.EvalResult(next(losses), 1.0, real(*args).labelled)

    monkeypatch.setattr(fit, "evaluate", evaluate)
    folder = train(
        "training.eval_every=2", "training.patience=2", "training.max_steps=20",
        "training.keep_checkpoints=1",
    )  # fmt: skip
    assert metrics(folder)[-1]["step"] == 8
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000008"], "the best, and the last"
    assert (folder / "final").is_dir()


def test_out_of_memory_says_what_took_it_and_what_to_try(train, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "summed_loss", fail)
    with pytest.raises(RunError, match=r"out of memory: weights .* GiB, gradients") as error:
        train()
    for change in (
        "(1) model.gradient_checkpointing=true (now false",
        "(2) training.optimizer=adamw8bit (now adamw)",
        "(3) training.batch_size=2 training.gradient_accumulation_steps=2 (now 4 and 1",
    ):
        assert change in str(error.value)


def test_every_setting_that_is_advised_is_accepted():
    for overrides in ([], ["model.init=pretrained", "training.batch_size=1"]):
        config, _ = load_config(SMOKE, overrides)
        for change in next_settings(config)[:-1]:
            keys = change.partition(" (")[0].partition(":")[0].split(" ")
            load_config(SMOKE, [*overrides, *keys])


def test_an_interrupted_run_goes_on_in_the_same_mlflow_run(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    arguments = [
        SMOKE, f"output_dir={tmp_path / 'run'}", "device=cpu", "data.eval=null",
        "training.max_steps=12", "training.log_every=2",
    ]  # fmt: skip
    real = fit.Fit._after_step

    def interrupt(self, result):
        if self.training.state.step == 7:
            # The tracker starts in the background: wait until it has an id to save.
            while not self.recorder.tracker.run_id:
                pass
            os.kill(os.getpid(), signal.SIGINT)
        real(self, result)

    monkeypatch.setattr(fit.Fit, "_after_step", interrupt)
    with pytest.raises(Interrupted, match=r"stopped by SIGINT after step 8 of 12") as stopped:
        scripts.train.main(arguments)
    assert stopped.value.exit_code == 130
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("smoke")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    monkeypatch.setattr(fit.Fit, "_after_step", real)
    scripts.train.main([*arguments, "training.resume=auto"])
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [p.step for p in points] == [2, 4, 6, 8, 10, 12], "nothing twice"


def test_a_tracking_server_that_refuses_costs_one_warning(train, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:canary@127.0.0.1:9")
    folder = train("tracking.enabled=true", "training.max_steps=4", "training.log_every=1")
    printed = capsys.readouterr()
    assert printed.out.count("MLflow failed") + printed.out.count("did not answer") == 1
    assert "canary" not in printed.out + printed.err
    assert len(metrics(folder)) == 4


def test_a_finished_run_can_be_extended_and_its_first_result_stays(train):
    folder = train("training.max_steps=4")
    first = (folder / "final/model.safetensors").read_bytes()
    train("training.max_steps=4", "training.resume=auto")
    assert (folder / "final/model.safetensors").read_bytes() == first, "nothing left to do"
    train("training.max_steps=8", "training.resume=auto")
    assert (folder / "final-step-00000004/model.safetensors").read_bytes() == first
    assert (folder / "final/model.safetensors").read_bytes() != first


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path, write_rows):
    """torchrun with two gloo ranks against one process that accumulates what both see."""
    rows = write_rows(*[chat("why? " * (n % 5), "because " * (1 + n % 7)) for n in range(24)])
    base = yaml.safe_load(Path(SMOKE).read_text())
    base["data"] |= {"train": rows, "eval": rows, "max_length": 64}
    base["training"] |= {"max_steps": 3, "log_every": 1, "warmup_steps": 0, "batch_size": 1}
    base["tracking"] = {"enabled": False}

    def run(name: str, launcher: list[str], **training) -> list[dict]:
        config = base | {
            "output_dir": str(tmp_path / name),
            "training": base["training"] | training,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        subprocess.run(
            [sys.executable, *launcher, str(ROOT / "scripts/train.py"), str(tmp_path / f"{name}.yaml"),
             "device=cpu"], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return metrics(tmp_path / name)

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = run("two", launcher)
    one = run("one", [], gradient_accumulation_steps=2)
    for a, b in zip(two, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-5)


def test_overfitting_a_few_rows_proves_mask_template_and_stop_token(train, capsys):
    train(
        "training.overfit=4", "training.epochs=120", "training.learning_rate=5e-3", "data.eval=null"
    )
    assert "overfit    passed" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"overfit not passed: row 1 says 'Two small matrices"):
        train("training.overfit=4", "training.epochs=1", "data.eval=null", output="short")
