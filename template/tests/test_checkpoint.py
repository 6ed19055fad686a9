"""A checkpoint brings back everything, and a damaged one is passed over."""

import shutil
from pathlib import Path

import pytest
import torch

import scripts.train
from conftest import SMOKE, chat, metrics
from src.training.checkpoint import (
    MOMENTS,
    WEIGHTS,
    Training,
    find_checkpoint,
    load_checkpoint,
    prune,
    save_checkpoint,
    trained_weights,
)

QUICK = ["training.save_every=3", "training.log_every=3", "data.eval=null"]


@pytest.fixture
def training(make_model) -> Training:
    """A model with an optimizer that has taken a step."""
    model = make_model(lora=True, packing=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.arange(8)[None]).logits.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return Training(model, optimizer, torch.amp.GradScaler("cpu"), {"model.name": "x"})


def save(training: Training, folder: Path, step: int, keep: int = 9) -> Path:
    training.state.step = step
    return save_checkpoint(training, folder, keep)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "a weight without moments"])
def test_a_checkpoint_brings_back_weights_moments_and_position(training, tmp_path, kind) -> None:
    if kind == "adamw8bit":
        from torchao.optim import AdamW8bit

        weights = list(trained_weights(training.model).values())
        weights.append(torch.nn.Parameter(torch.zeros(64, 64)))
        training.model.register_parameter("quantized_moments", weights[-1])
        training.optimizer = AdamW8bit(weights)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with torch.compiler.set_stance("force_eager"):
            training.optimizer.step()
    elif kind == "a weight without moments":
        del training.optimizer.state[next(iter(trained_weights(training.model).values()))]
    path = save(training, tmp_path, 7)
    kept = [training.model.state_dict(), training.moments()]
    expected = [{k: v.clone() for k, v in tensors.items()} for tensors in kept]
    for tensors in [trained_weights(training.model), training.moments()]:
        for tensor in tensors.values():
            tensor.data.add_(1)
    state, state.step = training.state, 99
    load_checkpoint(training, path)
    assert state is training.state
    assert state.step == 7
    for tensors, saved in zip(
        [training.model.state_dict(), training.moments()], expected, strict=True
    ):
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items())


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(training, tmp_path, capsys) -> None:
    older, newer = save(training, tmp_path / "a", 5), save(training, tmp_path / "a", 10)
    assert find_checkpoint("auto", tmp_path / "a") == newer
    tensors = [max((newer / part).iterdir()) for part in (WEIGHTS, MOMENTS)]
    for file in (*tensors, newer / "run.json", newer / "manifest.json"):
        shutil.copytree(newer, tmp_path / "whole")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1  # one bit
        file.write_bytes(data)
        assert find_checkpoint("auto", tmp_path / "a") == older
        assert "step-00000010: " in capsys.readouterr().out
        shutil.rmtree(newer)
        (tmp_path / "whole").rename(newer)


def test_pruning_keeps_the_newest_and_the_best(training, tmp_path):
    for step in (1, 2, 3, 4):
        training.state.best_step = 2
        save(training, tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (2, 3, 4)]
    own = {"step-00000001.mine", "step-notes"}
    for name in own:
        (tmp_path / name).mkdir()
    prune(tmp_path, 1, best_step=None)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000004", *own}


@pytest.fixture(scope="module")
def _six_steps(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("six") / "run"
    where = [f"output_dir={folder}", "tracking.enabled=false", "device=cpu"]
    scripts.train.main([SMOKE, *where, *QUICK, "training.max_steps=6"])
    return folder


@pytest.fixture
def six_steps(_six_steps: Path, tmp_path: Path) -> Path:
    """A run's folder after six steps, with a checkpoint after each third, for `train` to go on."""
    return shutil.copytree(_six_steps, tmp_path / "run")


def test_resuming_another_run_is_refused_with_each_difference_named(six_steps, refused, write_rows):
    rows = write_rows(chat("q", "a"))
    changes = ["data.max_length=64", "training.batch_size=2", "seed=1", f"data.train={rows}"]
    where = [f"output_dir={six_steps}", "tracking.enabled=false", "device=cpu"]
    lines = refused(scripts.train.main, SMOKE, *where, "training.resume=auto", *changes)
    for line, named in zip(
        lines,
        [
            "seed was 42 in step-00000006 and is 1 now",
            "data.max_length was 128",
            "training.batch_size was 4",
            "data.train was data/sample.jsonl",
        ],
        strict=True,
    ):
        assert named in line
        assert "training.resume_despite_changes=true" in line


def test_a_difference_can_be_allowed_and_a_new_learning_rate_counts(train, six_steps) -> None:
    allowed = ["training.batch_size=2", "training.resume_despite_changes=true"]
    rate = ["training.learning_rate=1e-5", "training.scheduler=constant", "training.log_every=1"]
    train("data.eval=null", *allowed, *rate, "training.max_steps=9", "training.resume=auto")
    # Still warming up over ten steps, but to the new rate.
    last = [line["learning_rate"] for line in metrics(six_steps)[-3:]]
    assert last == pytest.approx([7e-6, 8e-6, 9e-6])
