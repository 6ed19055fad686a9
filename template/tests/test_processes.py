"""Several processes train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, SMOKE, chat, metrics


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path, write_rows):
    """torchrun with two gloo ranks against one process that accumulates what both see."""
    rows = write_rows(*[chat("why? " * (n % 5), "because " * (1 + n % 7)) for n in range(24)])
    base = yaml.safe_load(Path(SMOKE).read_text())
    base["data"] |= {"train": rows, "eval": rows, "max_length": 64}
    base["training"] |= {"max_steps": 3, "log_every": 1, "warmup_steps": 0, "batch_size": 1}
    base["tracking"] = {"enabled": False}

    def run(name: str, launcher: list[str], **training) -> list[dict]:
        config = base | {
            "output_dir": str(tmp_path / name),
            "training": base["training"] | training,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        subprocess.run(
            [sys.executable, *launcher, str(ROOT / "scripts/train.py"), str(tmp_path / f"{name}.yaml"),
             "device=cpu"], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        return metrics(tmp_path / name)

    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = run("two", launcher)
    one = run("one", [], gradient_accumulation_steps=2)
    for a, b in zip(two, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=1e-5)
