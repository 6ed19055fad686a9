"""The result of a run is its best evaluated state, and what it answered is kept."""

import json
from collections import ChainMap
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import scripts.inference
from conftest import chat, metrics

KNOWN = "Hello! I am a very small model."


@pytest.fixture
def worse(train, write_rows, smoke) -> dict:
    """Options of a run that forgets what it is evaluated on: it learns another answer to it."""
    learnt, known = [chat("Say hello.", "Zzz. Qqq?")], chat("Say hello.", KNOWN)
    asked, saved = write_rows(known, name="asked.jsonl"), f"model.name={smoke / 'final'}"
    return {
        "data": [f"data.train={write_rows(*learnt)}", f"data.eval={asked}", saved],
        "pace": [
            *("training.batch_size=1", "training.epochs=8", "training.learning_rate=3e-3"),
            *("training.eval_every=2", "training.log_every=2", "training.warmup_steps=0"),
            "model.init=pretrained",
        ],
        "lora": ["lora.r=8"],
    }


def best_step(folder: Path) -> int:
    losses = {row["step"]: row["eval_loss"] for row in metrics(folder) if "eval_loss" in row}
    return min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("kind", ["all weights", "lora"])
@pytest.mark.parametrize("save_every", ["3", "null"])
def test_the_best_evaluated_weights_are_the_result(
    train, worse, kind: str, save_every: str, capsys
) -> None:
    options = [*worse["data"], *worse["pace"], f"training.save_every={save_every}"]
    folder = train(*options, *(worse["lora"] if kind == "lora" else []))
    best = best_step(folder)
    assert best < 8
    told = f"step {best} of 8, the best evaluation"
    assert told in capsys.readouterr().out
    for name in ("config.yaml", "final/training_config.yaml"):
        text = (folder / name).read_text()
        assert text.startswith(f"# final/ holds {told}\n")
        assert yaml.safe_load(text)["seed"] == 42
    result = load_file(next((folder / "final").glob("*.safetensors")))
    parts = (folder / f"checkpoints/step-{best:08d}/weights").iterdir()
    kept = dict(ChainMap(*map(load_file, parts)))
    assert sum(kept[n].numel() for n in kept) == sum(result[n].numel() for n in result)
    for name, weight in result.items():
        own = name if name in kept else name.replace(".weight", ".default.weight")
        assert kept[own].equal(weight), name
    assert (folder / "checkpoints/step-00000008").exists() == (save_every == "3")


def test_without_an_evaluation_the_last_weights_are_the_result(train, capsys) -> None:
    train("data.eval=null", "training.max_steps=2", "training.save_every=null")
    assert "step 2 of 2, the last step" in capsys.readouterr().out


def test_a_best_checkpoint_that_is_gone_is_told(train, worse, monkeypatch, capsys) -> None:
    from src.training import run

    monkeypatch.setattr(run, "save_checkpoint", lambda *_: None)
    train(*worse["data"], *worse["pace"])
    assert "the last step, as the checkpoint of the best one, " in capsys.readouterr().out


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_answers_before_and_during_training_are_kept_beside_the_numbers(
    train, smoke, capsys
) -> None:
    folder = train(
        f"model.name={smoke / 'final'}", "model.init=pretrained", "lora=null",
        "training.learning_rate=1e-6", "training.epochs=1", "training.eval_every=2",
        "evaluation.prompts=[What does LoRA train?,Say hello.]",
    )  # fmt: skip
    assert [row["step"] for row in samples(folder)] == [0, 2, 4]
    for row in samples(folder):
        assert row["samples"][1] == {"prompt": "Say hello.", "answer": KNOWN}
    assert "sample     'What does LoRA train?' → 'Two small matrices" in capsys.readouterr().out


def test_the_first_rows_are_asked_and_a_resumed_run_keeps_each_step_once(train, worse) -> None:
    options = [*worse["data"], *worse["pace"], "training.save_every=2", "evaluation.max_length=4"]
    folder = train(*options, "training.max_steps=5")
    asked = [{"role": "user", "content": "Say hello."}]
    assert [s["prompt"] for s in samples(folder)[0]["samples"]] == [asked]
    train(*options, "training.resume=auto", "training.keep_checkpoints=9")
    assert [row["step"] for row in samples(folder)] == [0, 2, 4, 5, 6, 8]
    train(*options, "evaluation.samples=0", output="silent")
    assert not (folder.parent / "silent/samples.jsonl").exists()


def test_the_result_answers_as_the_best_state_did(train, worse, capsys) -> None:
    folder = train(*worse["data"], *worse["pace"], *worse["lora"])
    best = best_step(folder)
    said = {row["step"]: row["samples"][0]["answer"] for row in samples(folder)}
    assert said[best] != said[8]
    capsys.readouterr()
    scripts.inference.main([str(folder / "final"), "Say hello.", "--max-length", "64"])
    assert capsys.readouterr().out.strip() == said[best]
