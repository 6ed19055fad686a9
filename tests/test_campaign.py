"""The measuring campaign for a GPU runs to its end, whatever becomes of one of its stages.

Here on a CPU, with a tiny shape: what it measures there is of no interest, that it works is.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import ROOT, TEMPLATE

SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture
def module(monkeypatch):
    """The script as a module, its stages not waiting for many seconds to be left."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    gpu = import_module("gpu")
    stages = {name: replace(stage, needs=4) for name, stage in gpu.STAGES.items()}
    monkeypatch.setattr(gpu, "STAGES", stages)
    return gpu


def campaign(out: Path, *options: str) -> tuple[int, dict[str, str], list[dict]]:
    """Run it; return its exit code, what became of each stage, and every line that it wrote."""
    command = [sys.executable, SCRIPT, "--cpu", "--out", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    lines = (out / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len((out / "results.md").read_text().splitlines()) == len(rows) + 5, done.stderr
    assert (rows[0]["name"], "torch" in rows.pop(0)["note"]) == ("machine", True)
    return done.returncode, {r["stage"]: r["status"] for r in rows if r["name"] == "stage"}, rows


def test_a_stage_reports_what_it_measures_and_is_judged_by_it(tmp_path, module) -> None:
    here = module.Campaign(tmp_path, tmp_path, cpu=True, run="", stage="smoke")
    shutil.copytree(TEMPLATE, here.project)
    (here.project / "scripts" / "train.py").write_text("")
    right = module.stages._questions(here)["What does LoRA train?"]
    for answer, status in ((right, "met"), ("What?", "failed")):
        (here.project / "scripts" / "inference.py").write_text(f"print({answer!r})")
        module.stages.run_smoke(here)
        seconds, judged = here.rows()[-2:]
        assert (seconds["status"], judged["status"]) == ("measured", status)
        assert seconds["value"] > 0
    assert here.wrong == ["the sample's answer comes back"]


def test_a_stage_that_fails_is_recorded_and_the_others_run(tmp_path) -> None:
    project, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(TEMPLATE, project)
    (project / "scripts" / "train.py").write_text(
        "import sys\nprint('it broke', file=sys.stderr)\nsys.exit(3)\n"
    )
    code, stages, rows = campaign(out, "--only", "smoke,lora,qlora", "--project", str(project))
    assert stages == {"smoke": "failed", "lora": "done", "qlora": "done"}, rows
    assert code == 1, "a stage of correctness failed"
    assert rows[0]["note"] == "RuntimeError: scripts/train.py: exit 3: it broke"
    assert "Traceback" in (out / "smoke.log").read_text()
    speeds = [row for row in rows if row["unit"] == "tokens/s"]
    assert len(speeds) == 5
    assert all(row["value"] > 0 and row["step_ms"] > 0 for row in speeds)
    assert next(row["value"] for row in rows if row["name"] == "4-bit/bf16 tokens/s") > 0


def test_a_stage_that_takes_too_long_is_killed_with_what_it_started(tmp_path, module) -> None:
    here = module.Campaign(tmp_path, tmp_path, cpu=True, run="", stage="smoke")
    shutil.copytree(TEMPLATE, here.project)
    code = (
        "import os, time\nprint(os.getpid(), file=open('pid', 'w'), flush=True)\ntime.sleep(99)\n"
    )
    (here.project / "scripts" / "train.py").write_text(code)
    assert not module.start(here, left=module.STAGES["smoke"].needs)
    (row,) = here.rows()
    assert (row["status"], row["note"][:12]) == ("failed", "killed after")
    status = Path("/proc", (here.project / "pid").read_text().strip(), "status")
    deadline = time.monotonic() + 10  # on a busy machine the kernel needs a moment
    while status.exists() and "zombie" not in status.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not status.exists() or "zombie" in status.read_text(), "nobody waits for it any more"


def test_without_time_no_stage_is_run(tmp_path) -> None:
    code, stages, rows = campaign(tmp_path, "--budget", "0")
    assert code == 0
    assert len(stages) == len(rows) == 18
    assert set(stages.values()) == {"not run"}
    assert {row["note"] for row in rows} == {"0 s left"}


@pytest.mark.parametrize("limit", [12, 24])
def test_the_longest_document_is_found_within_5_percent(monkeypatch, module, limit) -> None:
    fits = int((limit - 6) / 0.0003)  # GiB, and GiB a token

    def train(campaign, model, length, first, count) -> SimpleNamespace:
        if length > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate …")
        return SimpleNamespace(peak=5.5 + 0.0003 * length)

    monkeypatch.setattr(module.stages, "train", train)
    monkeypatch.setattr(
        module.stages, "documents", lambda vocabulary, length, budget, mixed: length
    )
    here = module.Campaign(Path(), Path(), cpu=False, run="", stage="longest")
    model = SimpleNamespace(zero_grad=lambda set_to_none: None)
    found, _ = module.stages._search(here, model, {}, limit, time.time() + 60)
    assert 0.94 * fits <= found <= fits


def test_the_campaign_names_no_machine() -> None:
    text = SCRIPT.read_text() + SCRIPT.with_name("gpu_stages.py").read_text()
    assert str(ROOT) not in text
    assert os.sep + "home" + os.sep not in text
