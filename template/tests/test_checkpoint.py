"""No crash, full disk or flipped bit costs more than the steps since the last checkpoint."""

import errno
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import scripts.train
from conftest import SMOKE, chat, metrics
from src.training.checkpoint import (
    MOMENTS,
    WEIGHTS,
    Training,
    explain_failed_write,
    find_checkpoint,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
)
from src.utils.errors import RunError, UserError

QUICK = ["training.save_every=3", "training.log_every=3", "data.eval=null"]


@pytest.fixture
def training(make_model) -> Training:
    """A model with an optimizer that has taken a step."""
    model = make_model(lora=True, packing=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.arange(8)[None]).logits.mean().backward()
    optimizer.step()
    return Training(model, optimizer, torch.amp.GradScaler("cpu"), {"model.name": "x"})


def save(training: Training, folder: Path, step: int, keep: int = 9) -> Path:
    training.state.step = step
    return save_checkpoint(training, folder, keep)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "a weight without moments"])
def test_a_checkpoint_brings_back_everything_random_generators_included(training, tmp_path, kind):
    def draw() -> list:
        return [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002

    if kind == "adamw8bit":
        from torchao.optim import AdamW8bit

        weights = list(training.trained().values())
        weights.append(torch.nn.Parameter(torch.zeros(64, 64)))
        training.model.register_parameter("quantized_moments", weights[-1])
        training.optimizer = AdamW8bit(weights)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with torch.compiler.set_stance("force_eager"):
            training.optimizer.step()
    elif kind == "a weight without moments":
        del training.optimizer.state[next(iter(training.trained().values()))]
    path = save(training, tmp_path, 7)
    kept = [training.model.state_dict(), training.moments()]
    expected = [{k: v.clone() for k, v in tensors.items()} for tensors in kept]
    drawn = draw()
    for tensors in [training.trained(), training.moments()]:
        for tensor in tensors.values():
            tensor.data.add_(1)
    state, state.step = training.state, 99
    load_checkpoint(training, path)
    assert state is training.state
    assert state.step == 7
    assert draw() == drawn
    for tensors, saved in zip(
        [training.model.state_dict(), training.moments()], expected, strict=True
    ):
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items())


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "emptied": lambda file: file.write_bytes(b""),
    "one byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one bit flipped": flip_a_bit,
}


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(training, tmp_path) -> None:
    older, newer = save(training, tmp_path / "a", 5), save(training, tmp_path / "a", 10)
    assert newest_checkpoint(tmp_path / "a") == (newer, [])
    tensors = [max((newer / part).iterdir()) for part in (WEIGHTS, MOMENTS)]
    for file in (*tensors, newer / "run.json", newer / "manifest.json"):
        for damage in DAMAGES.values():
            shutil.copytree(newer, tmp_path / "whole")
            damage(file)
            path, (warning,) = newest_checkpoint(tmp_path / "a")
            assert path == older
            assert "step-00000010: " in warning
            shutil.rmtree(newer)
            (tmp_path / "whole").rename(newer)
    for nothing in ("{}", "[]", "null"):
        (newer / "manifest.json").write_text(nothing)
        assert newest_checkpoint(tmp_path / "a")[0] == older
    (older / "run.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint under .* is whole"):
        find_checkpoint("auto", tmp_path / "a")


def test_resume_takes_a_checkpoint_or_the_newest_of_a_run(training, tmp_path) -> None:
    older, newer = (save(training, tmp_path / "run/checkpoints", step) for step in (5, 10))
    elsewhere = tmp_path / "other/checkpoints"
    for resume in (newer, newer.parent, tmp_path / "run"):
        assert find_checkpoint(str(resume), elsewhere) == (newer, [])
    assert find_checkpoint(str(older), elsewhere) == (older, [])
    assert find_checkpoint("auto", elsewhere) == (None, [])
    assert find_checkpoint("never", newer.parent) == (None, [])
    with pytest.raises(UserError, match="no readable manifest"):
        find_checkpoint(str(tmp_path), elsewhere)


def test_pruning_keeps_the_newest_and_the_best_and_files_follow_the_umask(training, tmp_path):
    old = os.umask(0o022)
    try:
        for step in (1, 2, 3, 4):
            training.state.best_step = 2
            save(training, tmp_path, step, keep=2)
    finally:
        os.umask(old)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (2, 3, 4)]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o644}
    own = {"step-00000001.mine", "step-notes"}
    for name in own:
        (tmp_path / name).mkdir()
    prune(tmp_path, 1, best_step=None)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000004", *own}
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-00000004"


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Writing beyond this size fails, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_write_that_fails_leaves_the_older_checkpoint_and_says_so(training, tmp_path):
    older = save(training, tmp_path, 5)
    expected = r"^\S+step-00000010: could not be written: .*; step-00000005 is whole: make room"
    with small_files(100_000), pytest.raises(RunError, match=expected) as error:
        save(training, tmp_path, 10)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"], "nothing half-written stays"
    assert find_damage(older) is None
    with pytest.raises(FileNotFoundError), explain_failed_write(older, tmp_path):
        raise FileNotFoundError(errno.ENOENT, "rows that are gone", "data/rows.jsonl")


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


def test_a_disk_that_is_full_at_the_end_costs_nothing(train, six_steps, capsys) -> None:
    shutil.rmtree(six_steps / "final")
    again = [*QUICK, "training.max_steps=6", "training.resume=auto"]
    expected = r"final: could not be written: .*; step-00000006 is whole: make room, then go on"
    with small_files(300_000), pytest.raises(RunError, match=expected):
        train(*again)
    assert not list(six_steps.glob("*final*"))
    flip_a_bit(six_steps / "checkpoints/step-00000006/run.json")
    train(*again)
    printed = capsys.readouterr().out
    assert "step-00000006: run.json is not what was written (checksum); skipped" in printed
    assert find_damage(six_steps / "checkpoints/step-00000006") is None, "the step was taken again"
    assert find_damage(six_steps / "checkpoints/step-00000006.1"), "the damaged one is kept"
    assert "resume     step-00000003" in printed
    assert (six_steps / "final").is_dir()


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


def test_weights_of_other_shapes_cannot_be_resumed_even_where_changes_are_allowed(six_steps, train):
    with pytest.raises(UserError, match=r"step-00000006/weights: has weights of other names or"):
        train(
            "data.eval=null", "training.resume=auto", "training.resume_despite_changes=true",
            "model.init=pretrained", "lora.r=2", f"model.name={six_steps / 'final'}",
        )  # fmt: skip


def test_a_difference_can_be_allowed_and_a_new_learning_rate_counts(train, six_steps) -> None:
    allowed = ["training.batch_size=2", "training.resume_despite_changes=true"]
    rate = ["training.learning_rate=1e-5", "training.scheduler=constant", "training.log_every=1"]
    train("data.eval=null", *allowed, *rate, "training.max_steps=9", "training.resume=auto")
    # Still warming up over ten steps, but to the new rate.
    last = [line["learning_rate"] for line in metrics(six_steps)[-3:]]
    assert last == pytest.approx([7e-6, 8e-6, 9e-6])
