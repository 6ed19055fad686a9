"""Several processes, started by torchrun with gloo, train and fail as one does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from conftest import ROOT, SMOKE, chat, metrics

pytestmark = pytest.mark.slow  # each start imports torch once a process

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
FAIL_ON_RANK_1 = """
import os, sys
sys.argv = ["scripts/train.py", *sys.argv[1:]]
from src.utils.errors import run_script
import scripts.train
from src.training import trainer
take = trainer.train_step
def fail(*arguments, **options):
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("on one rank alone")
    return take(*arguments, **options)
trainer.train_step = fail
run_script(scripts.train.main)
"""


@pytest.fixture
def start(tmp_path: Path, write_rows) -> Callable[..., subprocess.Popen]:
    """Start a run: `start(name, launcher, **training)`; 24 rows, of which a step sees four."""
    rows = write_rows(*[chat("why? " * (n % 5), "because " * (1 + n % 7)) for n in range(27)])
    base = yaml.safe_load(Path(SMOKE).read_text())
    base["data"] |= {"train": rows, "eval": rows, "max_length": 64}
    base["training"] |= {"log_every": 1, "warmup_steps": 0, "batch_size": 1, "epochs": 2}
    base["tracking"] = {"enabled": False}

    def begin(name: str, launcher: list[str], script: str = "", **training) -> subprocess.Popen:
        config = base | {"output_dir": str(tmp_path / name)}
        config["training"] = base["training"] | training
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        script = script or str(ROOT / "scripts/train.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, *launcher, script, str(tmp_path / f"{name}.yaml"), "device=cpu"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return begin


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(folder: Path) -> dict:
    return load_file(folder / "final/model.safetensors")


def assert_same(folder: Path, other: Path) -> None:
    """The same losses, and weights that are equal but for the order of sums."""
    for a, b in zip(metrics(folder), metrics(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert (a["tokens"], a["step"], a["epoch"]) == (b["tokens"], b["step"], b["epoch"])
        assert a.get("eval_loss", 0) == pytest.approx(b.get("eval_loss", 0), rel=1e-5)
    one, two = weights(folder), weights(other)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_two_processes_train_as_one_and_either_goes_on_where_the_other_stopped(tmp_path, start):
    finish(start("one", [], gradient_accumulation_steps=4))
    assert len(metrics(tmp_path / "one")) % 2 == 0
    finish(start("two", TORCHRUN, gradient_accumulation_steps=2))
    assert_same(tmp_path / "two", tmp_path / "one")
    total = len(metrics(tmp_path / "one"))
    half = {"save_every": 3, "keep_checkpoints": 99}
    finish(start("mixed", TORCHRUN, gradient_accumulation_steps=2, **half))
    for path in (tmp_path / "mixed/checkpoints").glob("step-*"):
        if path.name > "step-00000003":
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "mixed/final")
    output = finish(start("mixed", [], gradient_accumulation_steps=4, resume="auto", **half))
    assert "resume     step-00000003" in output
    assert metrics(tmp_path / "mixed")[-1]["step"] == total
    assert_same(tmp_path / "mixed", tmp_path / "one")


def test_a_killed_worker_restarts_the_group_from_the_newest_checkpoint(tmp_path, start):
    finish(start("undisturbed", TORCHRUN, epochs=12, save_every=5))
    disturbed = start("killed", [*TORCHRUN, "--max-restarts=1"], epochs=12, save_every=5)
    saved = tmp_path / "killed/checkpoints/step-00000005"
    while not saved.exists():
        assert disturbed.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{disturbed.pid}/task/{disturbed.pid}/children").read_text().split()
    workers = [
        int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(workers[1], signal.SIGKILL)
    assert "resume     step-" in finish(disturbed)
    one, two = weights(tmp_path / "undisturbed"), weights(tmp_path / "killed")
    assert all(one[name].equal(two[name]) for name in one)


def test_a_signal_to_torchrun_saves_on_all_and_is_told_once(tmp_path, start):
    process = start("stopped", TORCHRUN, epochs=200, save_every=5)
    while not (tmp_path / "stopped/checkpoints/step-00000005").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert output.count("stopped by SIGTERM after step") == 1
    last = metrics(tmp_path / "stopped")[-1]["step"]
    assert (tmp_path / f"stopped/checkpoints/step-{last:08d}/manifest.json").is_file()


def test_a_bad_key_is_named_once(start):
    process = start("bad", TORCHRUN, learning_rte=1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("unknown key; did you mean training.learning_rate?") == 1
    assert "exitcode  : 2" in output
    ours = output[: output.index("torch/distributed")]
    assert "Traceback" not in ours


def test_an_error_of_one_process_ends_all_and_is_shown_once(tmp_path, start):
    (tmp_path / "fail.py").write_text(FAIL_ON_RANK_1)
    process = start("fail", TORCHRUN, script=str(tmp_path / "fail.py"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("[rank 1] ZeroDivisionError: on one rank alone") == 1
    assert "closed by peer" not in output
