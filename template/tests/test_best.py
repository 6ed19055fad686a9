"""The result of a run is its best evaluated state, and what it answered is kept."""

import json
import shutil
from collections import ChainMap
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import scripts.inference
from conftest import chat, metrics

KNOWN = "Hello! I am a very small model."


@pytest.fixture
def worse(write_rows, smoke) -> list[str]:
    """Options of a run that forgets what it is evaluated on: it learns another answer to it."""
    learnt, known = chat("Say hello.", "Zzz. Qqq?"), chat("Say hello.", KNOWN)
    asked = write_rows(known, name="asked.jsonl")
    return [
        f"data.train={write_rows(learnt)}", f"data.eval={asked}", f"model.name={smoke / 'final'}",
        "model.init=pretrained", "training.batch_size=1", "training.epochs=8",
        "training.learning_rate=3e-3", "training.eval_every=2", "training.log_every=2",
        "training.warmup_steps=0", "evaluation.max_length=64",
    ]  # fmt: skip


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("lora", "save_every"), [([], "3"), (["lora.r=8"], "null")])
def test_the_best_evaluated_weights_are_the_result(train, worse, lora, save_every, capsys) -> None:
    options = [*worse, *lora, f"training.save_every={save_every}"]
    folder = train(*options)
    losses = {row["step"]: row["eval_loss"] for row in metrics(folder) if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    assert best < 8
    assert f"step {best} of 8, the best evaluation" in capsys.readouterr().out
    assert yaml.safe_load((folder / "final/training_config.yaml").read_text())["seed"] == 42
    result = load_file(next((folder / "final").glob("*.safetensors")))
    parts = (folder / f"checkpoints/step-{best:08d}/weights").iterdir()
    kept = dict(ChainMap(*map(load_file, parts)))
    assert sum(w.numel() for w in kept.values()) == sum(w.numel() for w in result.values())
    for name, weight in result.items():
        own = name if name in kept else name.replace(".weight", ".default.weight")
        assert kept[own].equal(weight), name
    last = folder / "checkpoints/step-00000008"
    assert last.exists() == (save_every == "3")
    answers = {row["step"]: row["samples"][0]["answer"] for row in samples(folder)}
    assert answers[best] != answers[8]
    scripts.inference.main([str(folder / "final"), "Say hello.", "--max-length", "64"])
    assert capsys.readouterr().out.strip() == answers[best]
    if last.exists():
        next((folder / f"checkpoints/step-{best:08d}/weights").iterdir()).write_bytes(b"")
        shutil.rmtree(folder / "final")
        train(*options, "training.resume=auto")
        gone = f"step 8 of 8, the last step, as step-{best:08d}, the best one, is gone or damaged"
        assert gone in capsys.readouterr().out


def test_answers_before_and_during_training_are_kept_beside_the_numbers(train, smoke, capsys):
    folder = train(
        f"model.name={smoke / 'final'}", "model.init=pretrained", "lora=null",
        "training.learning_rate=1e-6", "training.epochs=1", "training.eval_every=2",
        "evaluation.prompts=[What does LoRA train?,Say hello.]", "evaluation.max_length=64",
    )  # fmt: skip
    assert [row["step"] for row in samples(folder)] == [0, 2, 4]
    for row in samples(folder):
        assert row["samples"][1]["prompt"] == [{"role": "user", "content": "Say hello."}]
        assert row["samples"][1]["answer"] == KNOWN
    assert "sample     'What does LoRA train?' → 'Two small matrices" in capsys.readouterr().out


def test_the_first_rows_are_asked_and_a_resumed_run_keeps_each_step_once(train, worse) -> None:
    options = [*worse, "training.save_every=2", "evaluation.max_length=4"]
    folder = train(*options, "training.max_steps=5")
    asked = [{"role": "user", "content": "Say hello."}]
    assert [s["prompt"] for s in samples(folder)[0]["samples"]] == [asked]
    train(*options, "training.resume=auto", "training.keep_checkpoints=9")
    assert [row["step"] for row in samples(folder)] == [0, 2, 4, 5, 6, 8]
    train(*options, "training.max_steps=1", "evaluation.samples=0", output="silent")
    assert not (folder.parent / "silent/samples.jsonl").exists()
