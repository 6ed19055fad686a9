"""Measure all that only a GPU can show, on one H100 or H200.

    python benchmarks/gpu.py --out FOLDER                     # as many stages as 540 s allow
    python benchmarks/gpu.py --out FOLDER --only lora,qlora   # some, in this order
    python benchmarks/gpu.py --out FOLDER --cpu               # a tiny shape, to test this script

Measure the versions of the lock: the first line printed names those that differ. All stages take
about forty minutes; a machine lent for ten minutes at a time gets them in calls such as
`--only smoke,tests,deterministic,resume`, `--only scripts,lora,qlora`, `--only defaults`, `--only
compile,compile-checkpointing,compile-4bit`, `--only peers` and `--only plan,generate,longest,trl`.

Each stage is a process of its own with a time limit: none takes another with it. A figure is
printed and written to FOLDER/results.jsonl and results.md as soon as it is known, and stderr of a
stage that failed to FOLDER/STAGE.log. Exit code 1: a stage of correctness failed; goals that were
missed are no error. The project that is measured is a copy of `template/`.

It asks for no project environment: torch >= 2.11, transformers >= 5.17, peft, accelerate, pytest,
pyarrow, numpy, matplotlib, tqdm, filelock, safetensors, PyYAML and a C compiler (for `compile`,
and for a test) are taken from the machine. What it may lack travels as wheels, in MB:

    all stages             omegaconf 0.3, python-dotenv 0.1, pydantic 0.5, pydantic-core 2.3,
                           annotated-types 0.1, typing-inspection 0.1, typing-extensions 0.1
    qlora, longest,        bitsandbytes 43.2; for a part of `tests` too
    scripts, compile-4bit
    peers                  liger-kernel 0.3, for TRL with Liger (and all that trl needs)
    tests, resume          torchao 3.4, for a part of them
    trl, peers             trl 1.0, datasets 0.6, pandas 12.1, xxhash 0.5, multiprocess 0.2,
                           dill 0.2, fsspec 0.3, requests 0.1, urllib3 0.2,
                           charset-normalizer 0.3 (what the machine has may stay at home)

64.6 MB = 61.6 MiB together; 28.5 MB = 27.2 MiB once bitsandbytes has lost what other versions of
CUDA need, as below. mlflow is never imported here, and datasets by trl alone; its version 5 wants
a newer huggingface_hub than transformers 5.17 does. A stage whose package is absent is reported
as skipped: "no trl". Where there is a network:

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d /tmp/whl \
        omegaconf python-dotenv pydantic==2.14.3 pydantic-core==2.50.4 annotated-types \
        typing-inspection typing-extensions \
        bitsandbytes torchao trl datasets==4.7.0 pandas xxhash multiprocess dill fsspec \
        requests urllib3 charset-normalizer
    zip -qd /tmp/whl/bitsandbytes-*.whl '*_cuda1[12]*' '*_rocm*' '*_xpu*'  # leaves CUDA 13's

and on the GPU's machine, before this script:

    pip install --no-index --no-deps --target /tmp/site /tmp/whl/*.whl
    export PYTHONPATH=/tmp/site
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_stages as stages
from compare import HERE, TEMPLATE

PROJECT = ("omegaconf", "dotenv", "pydantic", "torch", "transformers", "peft", "pyarrow")
TRL = ("trl", "datasets", "pandas", "xxhash", "multiprocess", "dill", "fsspec", "requests")
SIGNS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "==": operator.eq}


@dataclass
class Campaign:
    """What a stage is given: where it reads, works and reports, and until when."""

    out: Path
    work: Path  # of all stages of this run
    cpu: bool
    run: str  # names this run in results.jsonl
    stage: str
    until: float = 0.0  # when the stage is killed, in time.time()'s seconds
    wrong: list[str] = field(default_factory=list)

    @property
    def project(self) -> Path:
        """The copy of the project."""
        return self.work / "project"

    @property
    def device(self) -> str:
        """Where to train, as torch and the project's config name it."""
        return "cpu" if self.cpu else "cuda"

    @property
    def longest(self) -> int:
        """Tokens of the longest document; a microbatch is two of them."""
        return 64 if self.cpu else 4096

    def left(self) -> float:
        """Seconds that this stage still has."""
        return self.until - time.time()

    def record(
        self, name: str, value: float | None = None, unit: str = "", goal: str = "", note: str = "",
        status: str = "", **facts: float,
    ) -> None:  # fmt: skip
        """Print a figure, and have it on the disk before going on."""
        judged = self.stage in STAGES and STAGES[self.stage].correctness
        if goal and (judged or not self.cpu):  # how fast a tiny shape is on a CPU has no goal
            sign, limit = goal.split()
            good = value is not None and SIGNS[sign](value, float(limit))
            status = "met" if good else "failed" if judged else "missed"
            self.wrong += [name] * (status == "failed")
        note = ", ".join([f"{k} {_number(v)}" for k, v in facts.items()] + [note] * bool(note))
        row = {"run": self.run, "stage": self.stage, "name": name, "value": value, "unit": unit}
        row |= {"goal": goal, "status": status or "measured", "note": note, **facts}
        shown = f"{_number(value)} {unit}".strip()
        line = " | ".join((self.stage, name, shown, goal, row["status"], note.replace("|", "/")))
        print(line, flush=True)
        _append(self.out / "results.jsonl", json.dumps(row))
        _append(self.out / "results.md", f"| {line} |")

    def rows(self) -> list[dict[str, Any]]:
        """All that this run has recorded."""
        path = self.out / "results.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if row["run"] == self.run]

    def smoke(self, output: Path, *overrides: str) -> list[str]:
        """The command of the smoke config's training."""
        fixed = ("tracking.enabled=false", f"output_dir={output}", f"device={self.device}")
        script = str(self.project / "scripts" / "train.py")
        return [sys.executable, script, "configs/smoke.yaml", *fixed, *overrides]

    def smoke_model(self) -> Path:
        """What the whole smoke run saves, trained once a campaign."""
        final = self.work / "smoke" / "final"
        if not final.exists():
            self.call(self.smoke(final.parent))
        return final

    def call(self, command: list[str]) -> str:
        """Run one of the project's scripts, and return what it printed."""
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.project)
        if done.returncode:
            script = Path(command[1]).relative_to(self.project)
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"{script}: exit {done.returncode}: {last}\n{done.stderr}")
        return done.stdout


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def _number(value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "" if value is None else f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class Stage:
    """A stage, and what it takes."""

    run: Callable[[Campaign], None]
    needs: int  # seconds; with fewer left it is not started
    limit: int  # seconds until it is killed
    packages: tuple[str, ...] = ()
    correctness: bool = False


STAGES = {  # in order of worth
    "smoke": Stage(stages.run_smoke, 30, 100, correctness=True),
    "tests": Stage(stages.run_tests, 40, 150, ("pytest",), correctness=True),
    "deterministic": Stage(stages.run_deterministic, 20, 60, correctness=True),
    "lora": Stage(stages.run_lora, 35, 90),
    "qlora": Stage(stages.run_qlora, 35, 90, ("bitsandbytes",)),
    "plan": Stage(stages.run_plan, 60, 200),
    "scripts": Stage(stages.run_scripts, 120, 400, ("bitsandbytes",), correctness=True),
    "trl": Stage(stages.run_trl, 60, 130, TRL),
    "peers": Stage(stages.run_peers, 200, 540, TRL),
    "resume": Stage(stages.run_resume, 45, 150, correctness=True),
    "generate": Stage(stages.run_generate, 25, 70, correctness=True),
    "long-job": Stage(stages.run_long_job, 60, 150),
    "longest": Stage(stages.run_longest, 40, 150, ("bitsandbytes",)),
    "defaults": Stage(stages.run_defaults, 120, 300, ("bitsandbytes",)),
    "compile": Stage(stages.run_compile, 40, 150),
    "compile-checkpointing": Stage(stages.run_compile_checkpointing, 40, 150),
    "compile-4bit": Stage(stages.run_compile_4bit, 40, 150, ("bitsandbytes",)),
    "processes": Stage(stages.run_processes, 60, 200, correctness=True),
}


def run_stage(c: Campaign) -> None:
    """What the process of a stage does."""
    from src.utils.environment import load_environment

    load_environment()
    try:
        STAGES[c.stage].run(c)
        if c.wrong:
            raise AssertionError(f"not as it has to be: {'; '.join(c.wrong)}")
    except BaseException as error:  # noqa: BLE001 - the stage fails, and says why
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        first = lines[-1 if isinstance(error, SystemExit) else 0]  # compare.py's: a traceback
        print(f"{type(error).__name__}: {first}", file=sys.stderr)  # start() reads the last line
        sys.exit(1)


def start(c: Campaign, left: float) -> bool:
    """Run a stage in a process of its own; whether it came to its end, or had a reason not to."""
    stage, began = STAGES[c.stage], time.time()
    if left < stage.needs:
        c.record("stage", status="not run", note=f"{max(left, 0):.0f} s left")
        return True
    if missing := [name for name in (*PROJECT, *stage.packages) if not find_spec(name)]:
        c.record("stage", status="skipped", note=f"no {', '.join(missing)}")
        return True
    seconds = min(left, stage.limit * (3 if c.cpu else 1))
    command = [sys.executable, __file__, "--stage", c.stage, "--out", str(c.out), "--run", c.run]
    command += ["--work", str(c.work), "--until", str(began + seconds)] + ["--cpu"] * c.cpu
    paths = [str(c.project), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(c.work / "hf")}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if c.cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    log = c.work / "stderr.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # what it started ends with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lines, reason = log.read_text(errors="replace").splitlines(), ""
    if code != 0:
        _append(c.out / f"{c.stage}.log", "\n".join(lines[-200:]))
        last = next((line for line in reversed(lines) if line.strip()), f"exit {code}")
        reason = f"killed after {seconds:.0f} s" if code is None else last
    status = "failed" if reason else "done"
    c.record("stage", time.time() - began, "s", status=status, note=reason)
    return not reason


def machine() -> str:
    """Card, driver, versions and commit, found without importing torch here."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    commit = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    found = []
    for name, command in (("GPU", query), ("commit", commit)):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            found.append(f"{name} {done.stdout.strip() or 'unknown'}")
        except OSError:
            found.append(f"{name} unknown")
    lock = (TEMPLATE / "uv.lock.jinja").read_text()
    names = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "trl", "liger-kernel")
    for name in names:
        locked = re.search(rf'^name = "{name}"\nversion = "(.*)"', lock, re.MULTILINE)
        try:
            same = locked is None or version(name).partition("+")[0] == locked[1]
            found.append(f"{name} {version(name)}" + ("" if same else f" (locked: {locked[1]})"))
        except PackageNotFoundError:
            found.append(f"no {name}")
    if (torch := find_spec("torch")) and torch.origin:
        text = Path(torch.origin).with_name("version.py").read_text()
        built = re.search(r"^cuda\b.*= '(.*)'", text, re.MULTILINE)
        found.append(f"CUDA {built[1] if built else 'none'}")
    return f"{', '.join(found)}, Python {sys.version.split()[0]}"


def summarise(rows: list[dict[str, Any]]) -> None:
    """What came out, in one short table."""
    print("\n| name | figure | goal | |\n|---|---:|---:|---|")
    for row in rows:
        name, status = row["name"], row["status"]
        if name == "stage":
            if status == "done":
                continue
            name, status = row["stage"], f"{status}: {row['note']}"
        print(f"| {name} | {_number(row['value'])} {row['unit']} | {row['goal']} | {status} |")


def _render_config(project: Path, source: Path) -> None:
    """Write configs/train.yaml of the copied template with the default answers."""
    template = source / "configs" / "train.yaml.jinja"
    if template.exists():
        answers = {"base_model": "unused", "quantization": "4bit", "project_name": "campaign"}
        text = re.sub(r"\{\{ (\w+).*?\}\}", lambda m: answers[m[1]], template.read_text())
        (project / "configs" / "train.yaml").write_text(text)


def main() -> int:
    """Run the stages one by one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, with commas between")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all of them")
    parser.add_argument("--cpu", action="store_true", help="a tiny shape, to test this script")
    parser.add_argument("--project", type=Path, default=TEMPLATE, help="another project")
    for name in ("--stage", "--run", "--work"):  # how it calls itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.stage:
        run_stage(Campaign(o.out, Path(o.work), o.cpu, o.run, o.stage, o.until))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through start()'s finally
    names, began = o.only.split(","), time.time()
    if unknown := set(names) - STAGES.keys():
        parser.error(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    o.out.mkdir(parents=True, exist_ok=True)
    run, broken = time.strftime("%Y-%m-%d %H:%M:%S"), False
    _append(o.out / "results.md", f"\n{run}\n\n| stage | name | figure | goal | | |")
    _append(o.out / "results.md", "|---|---|---:|---:|---|---|")
    whole = Campaign(o.out.resolve(), o.out, o.cpu, run, "campaign")
    whole.record("machine", note=machine())
    with tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True) as name:
        left_out = shutil.ignore_patterns(".venv", "outputs", "*.jinja", "__pycache__")
        shutil.copytree(o.project, Path(name) / "project", ignore=left_out)
        _render_config(Path(name) / "project", o.project)
        for stage in names:
            campaign = Campaign(o.out.resolve(), Path(name), o.cpu, run, stage)
            good = start(campaign, o.budget - (time.time() - began))
            broken = broken or (STAGES[stage].correctness and not good)
    summarise(whole.rows()[1:])
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
