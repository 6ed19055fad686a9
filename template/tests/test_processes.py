"""Several processes, started by torchrun with gloo, train and fail as one does."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import ROOT, SMOKE, chat, metrics

pytestmark = pytest.mark.slow  # each start imports torch once a process

RUN = ["-m", "torch.distributed.run"]
TORCHRUN = [*RUN, "--standalone", "--nproc-per-node=2"]
FOUR = [*RUN, "--standalone", "--nproc-per-node=4"]
FAIL_ON_RANK_1 = """
import os, sys
sys.argv = ["scripts/train.py", *sys.argv[1:]]
from src.utils.script import run_script
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

# Prints what each process has at its peak while it gets its shard, in MiB.
LOAD = """
import os, resource, sys
from functools import partial
import torch
from src.config import ModelConfig
from src.models.model import build_model, load_tokenizer
from src.training.strategy import distribute
from src.utils.distributed import process_group
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
cpu, config = torch.device("cpu"), ModelConfig(name=sys.argv[1])
build = partial(build_model, config, None, load_tokenizer(config), dtype=torch.float32)
build(torch.device("meta"))  # what importing takes
with process_group(cpu, 60):
    before = peak()
    objective = distribute(build, "fsdp", cpu, torch.float32)
    print(f"peak {os.environ['RANK']} {peak() - before:.0f}", flush=True)
"""


@pytest.fixture
def start(tmp_path: Path, write_rows) -> Callable[..., subprocess.Popen]:
    """Start a run: `start(name, launcher, **training)`; 24 rows, of which a step sees four."""
    rows = write_rows(*[chat("why? " * (n % 5), "because " * (1 + n % 7)) for n in range(27)])
    base = yaml.safe_load(Path(SMOKE).read_text())
    base["data"] |= {"train": rows, "eval": rows, "max_length": 64}
    base["training"] |= {"log_every": 1, "warmup_steps": 0, "batch_size": 1, "epochs": 2}
    base["tracking"] = {"enabled": False}

    def begin(
        name: str, launcher: list[str], script: str = "", sections: dict | None = None, **training
    ) -> subprocess.Popen:  # fmt: skip
        config = base | {"output_dir": str(tmp_path / name)} | (sections or {})
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
    return load_file(next((folder / "final").glob("*.safetensors")))


def rewind(folder: Path, step: str) -> None:
    """As if the run had been killed right after this checkpoint."""
    for path in (folder / "checkpoints").glob("step-*"):
        if path.name > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "final")


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
    rewind(tmp_path / "mixed", "step-00000003")
    output = finish(start("mixed", [], gradient_accumulation_steps=4, resume="auto", **half))
    assert "resume     step-00000003" in output
    assert metrics(tmp_path / "mixed")[-1]["step"] == total
    assert_same(tmp_path / "mixed", tmp_path / "one")


def test_a_sharded_run_equals_one_process_and_its_checkpoints_fit_any_strategy(tmp_path, start):
    half = {"save_every": 3, "keep_checkpoints": 99}
    finish(start("one", [], gradient_accumulation_steps=4, **half))
    output = finish(start("two", TORCHRUN, strategy="fsdp", gradient_accumulation_steps=2, **half))
    assert "strategy   fsdp" in output
    assert_same(tmp_path / "two", tmp_path / "one")
    parts = (tmp_path / "two/checkpoints/step-00000003/weights").iterdir()
    names = {path.name[:11] for path in parts}
    assert {"shard-00001", "shard-00002"} <= names
    for name, of, launcher, strategy, window in (
        ("to-one", "two", [], "auto", 4),
        ("to-four", "two", FOUR, "fsdp", 1),
        ("from-one", "one", TORCHRUN, "fsdp", 2),
    ):
        shutil.copytree(tmp_path / of, tmp_path / name)
        rewind(tmp_path / name, "step-00000003")
        more = {"strategy": strategy, "gradient_accumulation_steps": window, "resume": "auto"}
        assert "resume     step-00000003" in finish(start(name, launcher, **more, **half))
        assert_same(tmp_path / name, tmp_path / "one")


def test_a_sharded_adapter_equals_one_process(tmp_path, start, saved_model):
    lora = {"model": {"name": str(saved_model)}, "lora": {"r": 4}}
    lora["model"]["gradient_checkpointing"] = True
    options = {"sections": lora, "eval_every": 3}
    finish(start("one", [], gradient_accumulation_steps=4, **options))
    finish(start("two", TORCHRUN, strategy="fsdp", gradient_accumulation_steps=2, **options))
    assert (tmp_path / "two/final/adapter_model.safetensors").is_file()
    assert_same(tmp_path / "two", tmp_path / "one")


def test_two_machines_shard_within_and_copy_between(tmp_path, start):
    finish(start("one", [], gradient_accumulation_steps=4))
    port = [
        "--nnodes=2",
        "--nproc-per-node=2",
        "--master-addr=127.0.0.1",
        f"--master-port={free()}",
    ]
    agents = [start("four", [*RUN, *port, f"--node-rank={n}"], strategy="hsdp") for n in (0, 1)]
    for agent in agents:
        finish(agent)
    assert_same(tmp_path / "four", tmp_path / "one")


def free() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def test_loading_takes_the_memory_of_one_model_and_not_of_each_process(tmp_path, tokenizer):
    config = AutoConfig.from_pretrained(
        ROOT / "configs/tiny", hidden_size=1024, intermediate_size=4096, num_hidden_layers=9
    )
    model = AutoModelForCausalLM.from_config(config)
    size = sum(p.nbytes for p in model.parameters()) / 2**20  # in fp32, as it will be trained
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert size > 400
    (tmp_path / "load.py").write_text(LOAD)
    output = subprocess.run(
        [sys.executable, *FOUR, tmp_path / "load.py", tmp_path / "model"], check=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    peaks = {int(rank): int(mib) for rank, mib in re.findall(r"peak (\d) (\d+)", output)}
    assert len(peaks) == 4
    assert all(peaks[rank] < 0.5 * size for rank in (1, 2, 3)), (size, peaks)
    assert peaks[0] < 2 * size, (size, peaks)


def test_a_process_that_hangs_is_named(tmp_path, start):
    process = start("hung", TORCHRUN, epochs=2000, save_every=5, timeout=5)
    while not (tmp_path / "hung/checkpoints/step-00000005").exists():
        assert process.poll() is None
        time.sleep(0.01)
    worker = workers(process)[1]
    os.kill(worker, signal.SIGSTOP)
    lines = iter(process.stdout)
    assert any("error: training.timeout: rank 1 did not answer within 5 s" in x for x in lines)
    os.kill(worker, signal.SIGKILL)  # which torchrun does itself, after 30 s
    process.communicate(timeout=60)
    assert process.returncode != 0


def workers(agent: subprocess.Popen) -> list[int]:
    """The processes that train, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    found = {}
    for pid in children:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(v[5:]): int(pid) for v in variables if v.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


def test_a_killed_worker_restarts_the_group_from_the_newest_checkpoint(tmp_path, start):
    finish(start("undisturbed", TORCHRUN, epochs=12, save_every=5))
    disturbed = start("killed", [*TORCHRUN, "--max-restarts=1"], epochs=12, save_every=5)
    saved = tmp_path / "killed/checkpoints/step-00000005"
    while not saved.exists():
        assert disturbed.poll() is None
        time.sleep(0.01)
    os.kill(workers(disturbed)[1], signal.SIGKILL)
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
