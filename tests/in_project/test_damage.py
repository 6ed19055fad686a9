"""No full disk and no flipped bit costs more than the steps since the last checkpoint."""

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import SMOKE
from src.config import load_config
from src.training.checkpoint import (
    MOMENTS,
    WEIGHTS,
    find_checkpoint,
    find_damage,
)
from src.training.fit import explain_failures
from src.utils.errors import RunError, UserError
from test_checkpoint import QUICK, save
from test_checkpoint import _six_steps as _six_steps
from test_checkpoint import six_steps as six_steps
from test_checkpoint import training as training


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


def test_any_damage_to_any_file_is_noticed(training, tmp_path) -> None:
    older, newer = save(training, tmp_path / "a", 5), save(training, tmp_path / "a", 10)
    tensors = [max((newer / part).iterdir()) for part in (WEIGHTS, MOMENTS)]
    for file in (*tensors, newer / "run.json", newer / "manifest.json"):
        whole = file.read_bytes()
        for damage in DAMAGES.values():
            damage(file)
            assert find_checkpoint("auto", tmp_path / "a") == older
            file.write_bytes(whole)
    assert find_checkpoint("auto", tmp_path / "a") == newer
    for nothing in ("{}", "[]", "null"):
        (newer / "manifest.json").write_text(nothing)
        assert find_checkpoint("auto", tmp_path / "a") == older
    (older / "run.json").unlink()
    with pytest.raises(UserError, match=r"no whole checkpoint; .* starts anew"):
        find_checkpoint("auto", tmp_path / "a")


def test_resume_takes_a_checkpoint_or_the_newest_of_a_run(training, tmp_path) -> None:
    older, newer = (save(training, tmp_path / "run/checkpoints", step) for step in (5, 10))
    elsewhere = tmp_path / "other/checkpoints"
    for resume in (newer, newer.parent, tmp_path / "run"):
        assert find_checkpoint(str(resume), elsewhere) == newer
    assert find_checkpoint(str(older), elsewhere) == older
    assert find_checkpoint("auto", elsewhere) is None
    assert find_checkpoint("never", newer.parent) is None
    with pytest.raises(UserError, match=f"^training.resume: {tmp_path} has no whole checkpoint"):
        find_checkpoint(str(tmp_path), elsewhere)


def test_the_files_of_a_checkpoint_follow_the_umask(training, tmp_path) -> None:
    old = os.umask(0o022)
    try:
        path = save(training, tmp_path, 1)
    finally:
        os.umask(old)
    assert {f.stat().st_mode & 0o777 for f in path.rglob("*") if f.is_file()} == {0o644}


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
    older, config = save(training, tmp_path, 5), load_config(SMOKE)
    expected = (
        r"^\S+: could not be written or read: .*; checkpoints that are there are whole: make room"
    )
    with pytest.raises(RunError, match=expected) as error:  # noqa: SIM117
        with explain_failures(config), small_files(100_000):
            save(training, tmp_path, 10)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"], "nothing half-written stays"
    assert find_damage(older) is None
    with pytest.raises(FileNotFoundError), explain_failures(config):
        raise FileNotFoundError(errno.ENOENT, "rows that are gone", "data/rows.jsonl")


def test_a_disk_that_is_full_at_the_end_costs_nothing(train, six_steps, capsys) -> None:
    shutil.rmtree(six_steps / "final")
    again = [*QUICK, "training.max_steps=6", "training.resume=auto"]
    with (
        small_files(300_000),
        pytest.raises(RunError, match=r"run: could not be written or read: "),
    ):
        train(*again)
    assert not list(six_steps.glob("*final*"))
    flip_a_bit(six_steps / "checkpoints/step-00000006/run.json")
    train(*again)
    printed = capsys.readouterr().out
    assert "step-00000006: run.json is not what was written (checksum)" in printed
    assert find_damage(six_steps / "checkpoints/step-00000006") is None, "the step was taken again"
    assert find_damage(six_steps / "checkpoints/step-00000006.1"), "the damaged one is kept"
    assert "resume     step-00000003" in printed
    assert (six_steps / "final").is_dir()


def test_weights_of_other_shapes_cannot_be_resumed_even_where_changes_are_allowed(six_steps, train):
    with pytest.raises(UserError, match=r"step-00000006/weights: has weights of other names or"):
        train(
            "data.eval=null", "training.resume=auto", "training.resume_despite_changes=true",
            "model.init=pretrained", "lora.r=2", f"model.name={six_steps / 'final'}",
        )  # fmt: skip
