"""The job files of the question `launcher`: valid, and they do what they say."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from helpers import choices, render, run

TOOLS = Path(sys.executable).parent
FILES = {
    "slurm": "train.sbatch",
    "kubernetes": "train.yaml",
    "skypilot": "train.sky.yaml",
}
# What Slurm gives a job's script, played by two machines that are this one. `scancel` signals all but the script.
FAKES = {
    "scontrol": 'echo "scontrol $*" >> "$LOG"; [ "$1" = show ] && printf "one\\ntwo\\n"; exit 0',
    "scancel": 'echo "scancel $*" >> "$LOG"; kill -TERM $(cat "$LOG".pids)',
    "srun": (
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & echo $! >> "$LOG".pids; done; '
        "code=0; for p in $(jobs -p); do wait $p || code=$?; done; exit $code"
    ),
    "uv": 'echo "uv $*" >> "$LOG"; trap "exit 1" TERM; sleep "${TRAINING:-0}" & wait $!; exit $END',
}


@pytest.mark.parametrize("launcher", choices("launcher"))
def test_a_project_has_the_job_file_of_its_launcher_and_no_other(
    launcher: str, tmp_path: Path
) -> None:
    project = render(tmp_path, launcher=launcher)
    found = {path.name for path in (project / "launch").glob("*")}
    assert found == ({FILES[launcher]} if launcher in FILES else set())
    for path in (project / "launch").glob("*"):  # else each start on each rank compiles all imports
        assert "UV_COMPILE_BYTECODE=1 uv sync --locked" in path.read_text()


def slurm(tmp_path: Path, **environment: str) -> tuple[subprocess.Popen, Path]:
    """Start the batch script as Slurm would."""
    script = render(tmp_path / "project", launcher="slurm") / "launch/train.sbatch"
    run(TOOLS / "shellcheck", script, cwd=tmp_path)
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    log = tmp_path / "log"
    given = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "m[1-2]", "SLURM_NNODES": "2"}
    given |= {"SLURM_GPUS_ON_NODE": "8", "LOG": str(log), "END": "0", **environment}
    given["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    arguments = ["bash", str(script), "configs/my own.yaml", "lora.r=8"]
    process = subprocess.Popen(arguments, cwd=tmp_path, env={**os.environ, **given})
    return process, log


def test_a_slurm_job_starts_each_machine_with_its_number(tmp_path: Path) -> None:
    process, log = slurm(tmp_path)
    assert process.wait(60) == 0
    started = sorted(line for line in log.read_text().splitlines() if line.startswith("uv "))
    assert len(started) == 2
    for number, line in enumerate(started):
        assert f"run --no-sync torchrun --nnodes=2 --node-rank={number}" in line
        assert "--nproc-per-node=8 --master-addr=one --master-port=22345" in line
        assert line.endswith("scripts/train.py configs/my own.yaml lora.r=8 training.resume=auto")
    assert "requeue" not in log.read_text()


def test_a_slurm_job_that_fails_is_not_queued_again(tmp_path: Path) -> None:
    process, log = slurm(tmp_path, END="2")
    assert process.wait(60) == 2
    assert "requeue" not in log.read_text()


def test_a_slurm_job_whose_time_is_nearly_over_saves_and_queues_itself_again(
    tmp_path: Path,
) -> None:
    process, log = slurm(tmp_path, TRAINING="60")
    while not log.exists() or log.read_text().count("uv ") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    process.wait(30)
    lines = log.read_text().splitlines()
    assert lines.index("scancel --signal=TERM 12345") < lines.index("scontrol requeue 12345")


def test_the_kubernetes_job_is_valid(tmp_path: Path) -> None:
    import kubernetes_validate

    text = (render(tmp_path, launcher="kubernetes") / "launch/train.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    for each in (service, job):
        kubernetes_validate.validate(each, "1.33", strict=True)
    pod, name = job["spec"]["template"]["spec"], service["metadata"]["name"]
    arguments = pod["containers"][0]["args"]
    assert f"--nnodes={job['spec']['completions']}" in arguments
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    # A pod is found as JOB-INDEX.SUBDOMAIN, where SUBDOMAIN is a headless service that selects it.
    assert pod["subdomain"] == name
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert f"--master-addr={job['metadata']['name']}-0.{name}" in arguments
    assert f"--nproc-per-node={pod['containers'][0]['resources']['limits']['nvidia.com/gpu']}" in (
        arguments
    )


@pytest.mark.parametrize("name", ["a" * 64, "ab-" * 20 + "ab"])
def test_a_long_name_is_still_one_that_kubernetes_takes(name: str, tmp_path: Path) -> None:
    project = render(tmp_path, launcher="kubernetes", project_name=name)
    for document in yaml.safe_load_all((project / "launch/train.yaml").read_text()):
        taken = document["metadata"]["name"]
        assert len(f"{taken}-0") <= 63
        assert not taken.endswith("-")


def test_the_skypilot_task_runs_the_training_of_every_machine(tmp_path: Path) -> None:
    task = yaml.safe_load(
        (render(tmp_path, launcher="skypilot") / "launch/train.sky.yaml").read_text()
    )
    assert task["setup"].splitlines()[-1] == "UV_COMPILE_BYTECODE=1 uv sync --locked"
    for variable in ("NUM_NODES", "NODE_RANK", "NUM_GPUS_PER_NODE", "NODE_IPS"):
        assert f"$SKYPILOT_{variable}" in task["run"]
    assert "training.resume=auto" in task["run"]
