"""The road of a newcomer: train, look at what is left, ask; stop, resume, ask again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import scripts.inference
import scripts.train
from conftest import ROOT, chat
from src.config import load_config

QUESTION, ANSWER = (
    "What does LoRA train?",
    "Two small matrices per layer, whose product is added to the frozen weight.",
)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The smoke run as README tells it, tracked in a database of its own."""
    folder = tmp_path_factory.mktemp("smoke")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    try:
        scripts.train.main(
            [str(ROOT / "configs/smoke.yaml"), f"output_dir={folder / 'run'}", "device=cpu"]
        )
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    return folder / "run"


def test_the_smoke_run_memorises_its_sample_and_answers(smoke: Path, capsys) -> None:
    scripts.inference.main([str(smoke / "final"), QUESTION, "Say hello."])
    assert capsys.readouterr().out.splitlines() == [ANSWER, "Hello! I am a very small model."]


def test_a_run_leaves_what_it_promises(smoke: Path) -> None:
    assert {p.name for p in smoke.iterdir()} == {
        "config.yaml", "metrics.jsonl", "loss.png", "checkpoints", "final",
    }  # fmt: skip
    assert load_config(smoke / "config.yaml")[0].output_dir == str(smoke)
    lines = metrics(smoke)
    wanted = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
    assert all(wanted <= line.keys() for line in lines)
    assert [line["step"] for line in lines] == list(range(10, 161, 10))
    assert {"eval_loss", "perplexity"} <= lines[-1].keys()
    assert lines[0]["loss"] > 5 > 0.1 > lines[-1]["loss"]
    assert lines[-1]["tokens"] == 1844 * 40
    assert (smoke / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_has_the_parameters_and_metrics_of_the_run(smoke: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{smoke.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("smoke")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.003"
    assert run.data.params["model.name"] == "configs/tiny"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(p.step, p.value) for p in history] == [(m["step"], m["loss"]) for m in metrics(smoke)]


def test_a_second_run_in_the_same_folder_is_refused(smoke: Path, refused) -> None:
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*")}
    (line,) = refused(scripts.train.main, str(ROOT / "configs/smoke.yaml"), f"output_dir={smoke}")
    assert "holds a run already" in line
    assert {p: p.stat().st_mtime_ns for p in smoke.rglob("*")} == before


def test_qlora_on_a_saved_model_trains_and_its_adapter_answers(
    smoke, train, capsys, write_rows
) -> None:
    rows = write_rows(*[chat(f"What is the code of {n}?", "It is seven.") for n in "abcd"])
    folder = train(
        f"model.name={smoke / 'final'}", "model.init=pretrained", "model.quantization=4bit",
        "model.dtype=bf16", "lora.r=8", f"data.train={rows}", "data.eval=null",
        "training.learning_rate=1e-2", "training.epochs=30",
    )  # fmt: skip
    assert metrics(folder)[-1]["loss"] < 0.1 * metrics(folder)[0]["loss"]
    assert (folder / "final/adapter_config.json").is_file()
    capsys.readouterr()
    scripts.inference.main([str(folder / "final"), "What is the code of a?"])
    assert capsys.readouterr().out.strip() == "It is seven."


@pytest.mark.parametrize("lora", [False, True])
def test_a_stopped_run_ends_in_the_same_weights_as_one_that_was_not(smoke, train, lora):
    options = ["training.max_steps=10", "training.save_every=5", "training.log_every=5"]
    if lora:
        options += [f"model.name={smoke / 'final'}", "model.init=pretrained", "lora.dropout=0.1"]
    straight = train(*options, output="straight")
    twice = train(*options, output="twice")
    # As if the run had died after its first checkpoint.
    shutil.rmtree(twice / "checkpoints/step-00000010")
    shutil.rmtree(twice / "final")
    train(*options, "training.resume=auto", output="twice")
    name = "final/adapter_model.safetensors" if lora else "final/model.safetensors"
    assert (straight / name).read_bytes() == (twice / name).read_bytes()
    keys = ("step", "loss", "learning_rate", "grad_norm", "tokens")
    first, second = ([{k: m[k] for k in keys} for m in metrics(f)] for f in (straight, twice))
    assert first == second


def test_sigterm_saves_the_step_and_says_how_to_resume(tmp_path: Path) -> None:
    output = tmp_path / "run"
    config = yaml.safe_load((ROOT / "configs/smoke.yaml").read_text())
    config["output_dir"] = str(output)
    config["tracking"] = {"enabled": False}
    config["training"] |= {
        "epochs": 10000,
        "save_every": 100000,
        "log_every": 1,
        "scheduler": "constant",
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/train.py"), str(tmp_path / "c.yaml"), "device=cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    while process.poll() is None and not (output / "metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    last = metrics(output)[-1]["step"]
    assert f"after step {last} of" in errors
    assert "training.resume=auto" in errors
    assert "Traceback" not in errors
    assert [p.name for p in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"]
