"""No crash, full disk or flipped bit costs more than the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import scripts.train
from conftest import ROOT
from src.training.checkpoint import (
    Training,
    TrainState,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
)
from src.utils.errors import RunError

SMOKE = str(ROOT / "configs/smoke.yaml")


@pytest.fixture
def training(make_model) -> Training:
    """A model with an optimizer that has taken a step."""
    model = make_model(lora=True, packing=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.arange(8)[None]).logits.mean().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return Training(model, optimizer, scheduler, torch.amp.GradScaler("cpu"), TrainState(step=1))


def save(training: Training, folder: Path, step: int, keep: int = 9) -> Path:
    training.state.step = step
    return save_checkpoint(training, folder, {"model.name": "x"}, keep)


def test_a_checkpoint_brings_back_everything_random_generators_included(training, tmp_path):
    import random

    import numpy as np

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
    load_checkpoint(training, path, torch.device("cpu"))
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


QUICK = ["training.max_steps=6", "training.save_every=3", "training.log_every=3"]


def test_resuming_passes_over_a_damaged_checkpoint_with_a_warning(train, capsys):
    folder = train(*QUICK)
    shutil.rmtree(folder / "final")
    flip_a_bit(folder / "checkpoints/step-00000006/weights.safetensors")
    train(*QUICK, "training.resume=auto")
    printed = capsys.readouterr().out
    assert (
        "step-00000006: weights.safetensors is not what was written (checksum); skipped" in printed
    )
    assert "resume     step-00000003" in printed


def test_a_run_without_any_whole_checkpoint_is_not_silently_started_anew(train, refused, tmp_path):
    folder = train(*QUICK)
    for path in (folder / "checkpoints").iterdir():
        flip_a_bit(path / "state.pt")
    before = (folder / "metrics.jsonl").read_text()
    lines = refused(scripts.train.main, SMOKE, f"output_dir={folder}", "training.resume=auto")
    assert "no checkpoint under" in lines[0]
    assert (folder / "metrics.jsonl").read_text() == before


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
    train, refused, write_rows, override, named
):
    from conftest import chat

    folder = train(*QUICK)
    override = override.format(rows=write_rows(chat("q", "a")))
    lines = refused(
        scripts.train.main, SMOKE, f"output_dir={folder}", "training.resume=auto", override,
        "tracking.enabled=false", "device=cpu",
    )  # fmt: skip
    assert any(named in line and "training.allow_mismatch=true" in line for line in lines), lines


def test_a_learning_rate_that_is_changed_on_resuming_counts(train):
    train(*QUICK)
    options = ["training.max_steps=9", "training.log_every=1", "training.save_every=3"]
    changed = ["training.learning_rate=1e-5", "training.scheduler=constant"]
    folder = train(*options, *changed, "training.resume=auto")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Still warming up over ten steps, but to the new rate.
    assert [m["learning_rate"] for m in lines[-3:]] == pytest.approx([7e-6, 8e-6, 9e-6])


def test_a_difference_can_be_allowed(train):
    train(*QUICK)
    options = ["training.batch_size=2", "training.max_steps=9", "training.allow_mismatch=true"]
    folder = train("training.save_every=3", *options, "training.resume=auto")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 9


def test_two_runs_in_one_folder_are_refused_while_the_first_lives(train, refused, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".run.lock"):
        arguments = (SMOKE, f"output_dir={tmp_path / 'run'}", "tracking.enabled=false")
        (line,) = refused(scripts.train.main, *arguments)
    assert "another run is writing to" in line
    train(*QUICK)  # the lock of a run that is gone holds nobody back


SAVE_EVERY, STEPS = 5, 25
# About half a second each; the template's own CI asks for a hundred.
KILLS = int(os.environ.get("KILLS", "20"))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_weights(tmp_path):
    """`kill -9` at random instants, saving included; see `crash_harness` below."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= KILLS
    assert result["different_ends"] == 0
    assert result["most_steps_repeated"] <= SAVE_EVERY - 1
    if KILLS >= 100:
        assert result["kills_that_found_a_half_written_folder"] > 0, "no kill hit a save"


def crash_harness(folder: Path) -> None:
    """Train in forked children, kill each after a random time, resume until the end, compare."""
    import random
    import time

    from transformers import LlamaConfig, LlamaForCausalLM

    from src.config import TrainingConfig
    from src.training.fit import Fit
    from src.training.optimizer import make_optimizer, make_scheduler
    from src.training.signals import StopSignal

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    settings = TrainingConfig(save_every=SAVE_EVERY, log_every=100, keep_checkpoints=2)
    ids = torch.randint(0, 64, (STEPS, 2, 16))

    class Loader:
        """Batches by position, as the sampler of the real loader walks them."""

        epoch = position = 0
        sampler: Loader

        def __len__(self) -> int:
            return STEPS

        def __iter__(self):
            for batch in ids[self.position :]:
                yield {"input_ids": batch, "labels": batch}

    loader = Loader()
    loader.sampler = loader

    def child(run: Path) -> None:
        optimizer = make_optimizer(model, settings)
        training = Training(
            model, optimizer, make_scheduler(optimizer, settings, STEPS),
            torch.amp.GradScaler("cpu", enabled=False), TrainState(),
        )  # fmt: skip
        torch.manual_seed(1)
        path, _ = newest_checkpoint(run)
        if path:
            load_checkpoint(training, path, torch.device("cpu"))
        done = os.open(run.with_suffix(".done"), os.O_RDWR | os.O_CREAT)
        last = int(os.pread(done, 9, 0) or 0)
        repeated = os.open(run.with_suffix(".repeated"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(repeated, f"{last - training.state.step}\n".encode())

        class Watched(Fit):
            def _after_step(self, *args) -> None:
                super()._after_step(*args)
                os.pwrite(done, f"{training.state.step:09d}".encode(), 0)

        cpu = torch.device("cpu")
        with StopSignal() as stop:
            Watched(
                training, loader, None, settings, cpu, torch.float32, STEPS, None, run, {}, stop
            ).run()  # fmt: skip

    def start(run: Path) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            child(run)
            code = 0
        finally:
            os._exit(code)

    # The first step imports half of torch: pay for it once, before the forks.
    warm = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    model(ids[0], labels=ids[0]).loss.backward()
    warm.step()
    warm.zero_grad()
    began = time.perf_counter()
    assert os.waitpid(start(folder / "straight"), 0)[1] == 0
    seconds = time.perf_counter() - began
    expected = (folder / f"straight/step-{STEPS:08d}/weights.safetensors").read_bytes()

    rng = random.Random(0)
    kills = runs = different = half_written = 0
    while kills < KILLS:
        run = folder / f"run{runs}"
        runs += 1
        while True:
            pid = start(run)
            time.sleep(rng.uniform(0, seconds))
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), "a restart failed"
            kills += 1
            half_written += any(run.glob(".*.tmp"))
        final = run / f"step-{STEPS:08d}/weights.safetensors"
        different += final.read_bytes() != expected
    repeated = [int(n) for f in folder.glob("*.repeated") for n in f.read_text().split()]
    print(
        json.dumps(
            {
                "runs": runs,
                "kills": kills,
                "different_ends": different,
                "most_steps_repeated": max(repeated),
                "kills_that_found_a_half_written_folder": half_written,
            }
        )
    )


if __name__ == "__main__":
    crash_harness(Path(sys.argv[1]))
