"""`kill -9` at random instants costs no more than the steps since the last checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT, SMOKE
from src.config import load_config
from src.data.dataset import Facts
from src.training import run
from src.training.checkpoint import Run, find_checkpoint, identify, load_checkpoint
from src.training.optimizer import make_optimizer
from src.training.report import Recorder
from src.training.signals import StopSignal
from src.training.speed import Speed
from src.training.trainer import as_objective, train_epoch

SAVE_EVERY, STEPS = 5, 25
# About half a second each; the template's own CI asks for more.
KILLS = int(os.environ.get("KILLS", "20"))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_weights(tmp_path):
    """`kill -9` at random instants, saving included; see `crash_harness` below."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] >= KILLS
    assert result["different_ends"] == 0
    assert result["most_steps_repeated"] <= SAVE_EVERY - 1
    if KILLS >= 50:
        assert result["kills_that_found_a_half_written_folder"] > 0, "no kill hit a save"


class Batches:
    """A loader and its sampler: batches from a position on."""

    epoch, position, batches = 0, 0, STEPS

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids, self.sampler = ids, self

    def __iter__(self):
        for batch in self.ids[self.position :]:
            yield {"input_ids": batch, "labels": batch}


def train_child(model: LlamaForCausalLM, ids: torch.Tensor, output: Path) -> None:
    """Go on from the newest checkpoint to the end; write down how far it came and what it repeats."""
    options = [f"output_dir={output}", f"training.save_every={SAVE_EVERY}"]
    quiet = ["training.log_every=100", "tracking.enabled=false"]
    config = load_config(SMOKE, [*options, *quiet])
    optimizer, scaler = make_optimizer(model, config.training), torch.amp.GradScaler(enabled=False)
    data: Any = SimpleNamespace(left_out=Path(os.devnull), facts=Facts())
    loader: Any = Batches(ids)
    loader.dataset = data
    parts = Run(
        model, optimizer, scaler, identify(config, Facts()), config=config, tokenizer=data,
        objective=as_objective(model, torch.float32), dtype=torch.float32, train_loader=loader,
        eval_loader=None, speed=Speed(1, 1, 1), total_steps=STEPS,
    )  # fmt: skip
    torch.manual_seed(1)
    path = find_checkpoint("auto", output / "checkpoints")
    if path:
        load_checkpoint(parts, path)
    done = os.open(output.with_suffix(".done"), os.O_RDWR | os.O_CREAT)
    last = int(os.pread(done, 9, 0) or 0)
    with output.with_suffix(".repeated").open("a") as repeated:
        repeated.write(f"{last - parts.state.step}\n")
    training_steps = run.training_steps

    def watched(*args, **options):
        for step in training_steps(*args, **options):
            try:
                yield step
            finally:  # the run has done all that is due after this step, saving included
                os.pwrite(done, f"{parts.state.step:09d}".encode(), 0)

    run.training_steps = watched
    with Recorder(parts) as recorder, StopSignal() as stop:
        run._train(parts, recorder, stop, lambda: None)


def crash_harness(folder: Path) -> None:
    """Train in forked children, kill each after a random time, resume until the end, compare."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.randint(0, 64, (STEPS, 2, 16))

    def start(output: Path) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            train_child(model, ids, output)
            code = 0
        finally:
            os._exit(code)

    def result(output: Path) -> dict[str, torch.Tensor]:
        (file,) = (output / f"checkpoints/step-{STEPS:08d}/weights").iterdir()
        return load_file(file)

    # The first step imports half of torch: pay for it once, before the forks.
    warm = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    train_epoch(model, [{"input_ids": ids[0], "labels": ids[0]}], warm, None, "cpu")
    began = time.perf_counter()
    assert os.waitpid(start(folder / "straight"), 0)[1] == 0
    seconds, expected = time.perf_counter() - began, result(folder / "straight")

    rng = random.Random(0)
    kills = runs = different = half_written = 0
    while kills < KILLS:
        output = folder / f"run{runs}"
        runs += 1
        while True:
            pid = start(output)
            time.sleep(rng.uniform(0, seconds))
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
            if status == 0:
                break
            assert os.WIFSIGNALED(status), "a restart failed"
            kills += 1
            half_written += any((output / "checkpoints").glob(".*.tmp"))
        weights = result(output)
        different += not all(weights[name].equal(weight) for name, weight in expected.items())
    repeated = [int(n) for f in folder.glob("*.repeated") for n in f.read_text().split()]
    figures = {
        "kills": kills,
        "different_ends": different,
        "most_steps_repeated": max(repeated),
        "kills_that_found_a_half_written_folder": half_written,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    crash_harness(Path(sys.argv[1]))
