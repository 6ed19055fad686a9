"""No crash, full disk or flipped bit costs more than the steps since the last checkpoint."""

import os
import random
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import scripts.train
from conftest import SMOKE, chat, metrics
from src.training.checkpoint import (
    Training,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
)
from src.utils.errors import RunError


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


def test_a_checkpoint_brings_back_everything_random_generators_included(training, tmp_path):
    def draw() -> list:
        return [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002

    path = save(training, tmp_path, 7)
    expected = {k: v.clone() for k, v in training.model.state_dict().items()}, draw()
    moments = [v.clone() for s in training.optimizer.state.values() for v in s.values()]
    for p in training.model.parameters():
        p.data.add_(1)
    for state in training.optimizer.state.values():
        state["exp_avg"].add_(1)
    training.state.step = 99
    for name, p in training.model.named_parameters():
        if not p.requires_grad:  # frozen weights are no part of a checkpoint
            p.data.copy_(expected[0][name])
    load_checkpoint(training, path)
    assert training.state.step == 7
    assert draw() == expected[1]
    assert all(torch.equal(v, expected[0][k]) for k, v in training.model.state_dict().items())
    found = [v for s in training.optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(found, moments, strict=True))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt", "run.json", "manifest.json"])
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        flip_a_bit,
    ],
    ids=["deleted", "emptied", "one byte short", "half", "one bit flipped"],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    training, tmp_path, name, damage
):
    older, newer = save(training, tmp_path, 5), save(training, tmp_path, 10)
    assert newest_checkpoint(tmp_path) == (newer, [])
    damage(newer / name)
    path, warnings = newest_checkpoint(tmp_path)
    if name == "manifest.json" and damage is flip_a_bit and find_damage(newer) is None:
        pytest.fail("a flipped bit in the manifest was not noticed")
    assert path == older
    assert len(warnings) == 1
    assert "step-00000010" in warnings[0]


def test_pruning_keeps_the_newest_and_the_best(training, tmp_path):
    for step in (1, 2, 3, 4):
        training.state.best_step = 2
        save(training, tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (2, 3, 4)]
    prune(tmp_path, 1, best_step=None)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_files_are_readable_as_the_umask_says(training, tmp_path):
    old = os.umask(0o022)
    try:
        path = save(training, tmp_path, 1)
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}


@contextmanager
def file_size_limit(folder: Path):
    """No file may grow beyond 100 kB: the same failing write as on a full disk, for any user."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)


@contextmanager
def small_disk(folder: Path):
    """A file system of 1 MB with 100 kB left."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small file system; the file size limit stands in for it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_write_that_fails_leaves_the_older_checkpoint_and_says_so(training, tmp_path):
    older = save(training, tmp_path, 5)
    with (
        file_size_limit(tmp_path),
        pytest.raises(RunError, match=r"step-00000005 before it is whole"),
    ):
        save(training, tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"], "nothing half-written stays"
    assert find_damage(older) is None


def test_a_full_disk_is_named_with_what_is_needed_and_what_is_free(training, tmp_path):
    with small_disk(tmp_path):
        older = save(training, tmp_path, 5)
        (tmp_path / "ballast").write_bytes(b"x" * (shutil.disk_usage(tmp_path).free - 100_000))
        with pytest.raises(
            RunError, match=r"the disk is full: it takes about 0.00 GiB and 0.00 are"
        ):
            save(training, tmp_path, 10)
        assert {p.name for p in tmp_path.iterdir()} == {"step-00000005", "ballast"}
        assert find_damage(older) is None


QUICK = ["training.save_every=3", "training.log_every=3", "data.eval=null"]


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


def test_resuming_passes_over_a_damaged_checkpoint_with_a_warning(train, six_steps, capsys):
    shutil.rmtree(six_steps / "final")
    flip_a_bit(six_steps / "checkpoints/step-00000006/weights.safetensors")
    train(*QUICK, "training.max_steps=6", "training.resume=auto")
    printed = capsys.readouterr().out
    assert (
        "step-00000006: weights.safetensors is not what was written (checksum); skipped" in printed
    )
    assert "resume     step-00000003" in printed


def test_a_run_without_any_whole_checkpoint_is_not_silently_started_anew(six_steps, refused):
    for path in (six_steps / "checkpoints").iterdir():
        flip_a_bit(path / "state.pt")
    before = (six_steps / "metrics.jsonl").read_text()
    lines = refused(scripts.train.main, SMOKE, f"output_dir={six_steps}", "training.resume=auto")
    assert "no checkpoint under" in lines[0]
    assert (six_steps / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.max_length=64", "data.max_length was 128 in step-00000006 and is 64 now"),
        ("training.batch_size=2", "training.batch_size was 4"),
        ("seed=1", "seed was 42"),
        ("data.train={rows}", "data.train was data/sample.jsonl"),
    ],
)
def test_resuming_another_run_is_refused_with_the_difference_named(
    six_steps, refused, write_rows, override, named
):
    override = override.format(rows=write_rows(chat("q", "a")))
    lines = refused(
        scripts.train.main, SMOKE, f"output_dir={six_steps}", "training.resume=auto", override,
        "tracking.enabled=false", "device=cpu",
    )  # fmt: skip
    advice = "training.resume_despite_changes=true"
    assert any(named in line and advice in line for line in lines), lines


def test_a_difference_can_be_allowed(train, six_steps):
    allowed = ["training.batch_size=2", "training.resume_despite_changes=true"]
    train(*QUICK, *allowed, "training.max_steps=9", "training.resume=auto")
    assert metrics(six_steps)[-1]["step"] == 9


def test_a_learning_rate_that_is_changed_on_resuming_counts(train, six_steps):
    changed = ["training.learning_rate=1e-5", "training.scheduler=constant"]
    options = ["training.max_steps=9", "training.log_every=1", "data.eval=null"]
    train(*options, *changed, "training.resume=auto")
    # Still warming up over ten steps, but to the new rate.
    assert [m["learning_rate"] for m in metrics(six_steps)[-3:]] == pytest.approx(
        [7e-6, 8e-6, 9e-6]
    )
