"""Several processes train and fail, with gloo, as one does: torchrun's, or forks of one.

A fork has the libraries; a process of torchrun takes ten seconds of CPU to import them.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bitsandbytes
import peft
import pytest
import torch
import torchao
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import scripts.train
from conftest import ROOT, SMOKE, chat, metrics, write_lines
from test_road import WHOLE, command, walk_from
from test_road import base as base

pytestmark = pytest.mark.slow  # each start imports torch once a process

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
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

LONG = ["training.epochs=12", "training.save_every=5"]  # long enough to be killed in the middle


def options(folder: Path) -> list[str]:
    """Of a run in `folder`, on 27 rows beside it, of which a step sees four."""
    rows = folder.with_name("rows.jsonl")
    write_lines(rows, *[chat("why? " * (n % 5), "because " * (1 + n % 7)) for n in range(27)])
    return [
        SMOKE, f"output_dir={folder}", f"data.train={rows}", f"data.eval={rows}", "device=cpu",
        "data.max_length=64", "tracking.enabled=false", "training.log_every=1",
        "training.warmup_steps=0", "training.batch_size=1", "training.epochs=2",
    ]  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": paths}


def in_forks(processes: int, work: Callable[..., None], *arguments: object) -> None:
    """Call `work` in so many processes, two on a machine, which find each other as torchrun's do."""
    port, children = str(free_port()), []
    for rank in range(processes):
        if pid := os.fork():
            children.append(pid)
            continue
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        for name in [*sys.modules]:  # the project's own read them when they are imported
            if name.partition(".")[0] in {"src", "scripts"}:
                del sys.modules[name]
        try:
            work(*arguments)
            os._exit(0)
        finally:  # after an error
            traceback.print_exc()
            os._exit(1)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * processes


def train(commands: list[list[str]]) -> None:
    """Train several runs one after another."""
    import scripts.train
    from src.utils import distributed

    for arguments in commands:
        scripts.train.main(arguments)
        distributed.RESTARTS += 1  # the next run's names in the store that all of them share


def load(model: str) -> None:
    """Print how much a process's memory grows, in MiB, while it gets its shard of a model."""
    from src.config import ModelConfig
    from src.models.model import build_model, load_tokenizer
    from src.training.strategy import distribute
    from src.utils import distributed

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    cpu, config = torch.device("cpu"), ModelConfig(name=model)
    build = partial(build_model, config, None, load_tokenizer(config), dtype=torch.float32)
    build(torch.device("meta"))  # what importing takes
    with distributed.process_group(cpu, 60):
        before = peak()
        kept = distribute(build, 4, cpu, torch.float32)
        print(f"peak {os.environ['RANK']} {peak() - before:.0f}", flush=True)
        del kept
    distributed.RESTARTS += 1


def load_and_train(model: str, commands: list[list[str]]) -> None:
    load(model)
    train(commands)


def copy_killed(start: Path, copy: Path) -> None:
    """Copy a run as if it had been killed after its third step."""
    shutil.copytree(start, copy)
    shutil.rmtree(copy / "final")
    for path in (copy / "checkpoints").glob("step-*"):
        if path.name > "step-00000003":
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A model whose weights are most of what a process holds."""
    config = AutoConfig.from_pretrained(
        ROOT / "configs/tiny", hidden_size=1024, intermediate_size=4096, num_hidden_layers=9
    )
    folder = tmp_path_factory.mktemp("large")
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


KINDS = {"lora": [WHOLE, "model.gradient_checkpointing=true"], "full": ["lora=null"]}
ROADS = [(strategy, kind) for strategy in ("ddp", "fsdp") for kind in KINDS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, saved_model: Path, large_model: Path, base: Callable) -> Path:
    """A folder of runs that all do the same, with one process or several; or end as another one."""
    folder = tmp_path_factory.mktemp("runs")
    pretrained = [f"model.name={saved_model}", "model.init=pretrained"]
    lora = [*pretrained, "lora.r=4", "model.gradient_checkpointing=true"]

    def run(name: str, window: int, *more: str) -> list[str]:
        saved = ["training.save_every=3", "training.keep_checkpoints=99"]
        window_size = f"training.gradient_accumulation_steps={window}"
        return [*options(folder / name), *saved, window_size, *more]

    def road(strategy: str, kind: str, *more: str) -> list[str]:
        output, rows = folder / f"road-{strategy}-{kind}", str(folder / "road.jsonl")
        write_lines(Path(rows), *[chat("why? " * (1 + n), "because " * 3) for n in range(6)])
        strategies = [f"training.strategy={strategy}", *KINDS[kind]]
        return command(base("untied"), rows, output, *strategies, *more)

    fsdp, resume = "training.strategy=fsdp", "training.resume=auto"
    scripts.train.main(run("one", 4))
    scripts.train.main(run("lora", 4, *lora))
    copy_killed(folder / "one", folder / "one-to-fsdp")
    two = [
        run("ddp", 2),
        run("fsdp", 2, fsdp),
        run("lora-fsdp", 2, fsdp, *lora),
        run("one-to-fsdp", 2, fsdp, resume),
        [*options(folder / "undisturbed"), *LONG],
        *(road(*each, "training.max_steps=2") for each in ROADS),
        *(road(*each, resume) for each in ROADS),
    ]
    four = [run("fsdp-to-four", 1, fsdp, resume), run("hsdp", 1, "training.strategy=hsdp")]
    work = json.dumps([str(folder), str(large_model), two, four])
    done = subprocess.run(
        [sys.executable, "-u", __file__, work], cwd=ROOT, env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    assert "strategy   fsdp: as training.strategy says" in done.stdout
    assert done.stdout.count("resume     step-00000003") == 2
    for start in ("ddp", "fsdp"):
        copy_killed(folder / start, folder / f"{start}-to-one")
        scripts.train.main(run(f"{start}-to-one", 4, resume))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "final").glob("*.safetensors")))


def assert_same(folder: Path, other: Path) -> None:
    """The same losses, and weights that are equal but for the order of sums."""
    for a, b in zip(metrics(folder), metrics(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert (a["tokens"], a["step"], a["epoch"]) == (b["tokens"], b["step"], b["epoch"])
        assert a.get("eval_loss", 0) == pytest.approx(b.get("eval_loss", 0), rel=1e-5)
    one, two = weights(folder), weights(other)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp", "hsdp", "one-to-fsdp", "fsdp-to-four", "ddp-to-one", "fsdp-to-one"]
)
def test_any_strategy_trains_as_one_process_and_its_checkpoints_fit_any_other(runs, name) -> None:
    assert len(metrics(runs / "one")) % 2 == 0
    assert_same(runs / name, runs / "one")
    parts = (runs / "fsdp/checkpoints/step-00000003/weights").iterdir()
    assert {"shard-00001", "shard-00002"} == {path.name[:11] for path in parts}


def test_a_sharded_adapter_equals_one_process(runs) -> None:
    assert (runs / "lora-fsdp/final/adapter_model.safetensors").is_file()
    assert_same(runs / "lora-fsdp", runs / "lora")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_walk_the_road_in_either_strategy(runs, kind, monkeypatch) -> None:
    losses = []
    for strategy in ("ddp", "fsdp"):
        run = runs / f"road-{strategy}-{kind}"
        assert [line["step"] for line in metrics(run)] == [1, 2, 3]
        losses.append([line["loss"] for line in metrics(run)])
        (runs / f"{run.name}-walked").mkdir()
        walk_from(run, str(runs / "road.jsonl"), runs / f"{run.name}-walked", monkeypatch)
    # What is summed in another order is rounded in another way, and no more.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Start torchrun: `start(name, launcher, *overrides)`."""

    def begin(
        name: str, launcher: list[str], *more: str, script: Path = ROOT / "scripts/train.py"
    ) -> subprocess.Popen:
        return subprocess.Popen(
            [*TORCHRUN, *launcher, script, *options(tmp_path / name), *more], cwd=ROOT,
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return begin


TWO = ["--standalone", "--nproc-per-node=2"]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def workers(agent: subprocess.Popen) -> list[int]:
    """The processes that train, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ranks = {}
    for pid in children:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(v[5:]): int(pid) for v in variables if v.startswith(b"RANK=")}
    return [ranks[rank] for rank in sorted(ranks)]


def test_loading_takes_the_memory_of_one_model_and_not_of_each_process(runs, large_model) -> None:
    # It is trained in fp32, and saved in bf16.
    size = 2 * sum(file.stat().st_size for file in large_model.glob("*.safetensors")) / 2**20
    assert size > 400
    found = re.findall(r"peak (\d) (\d+)", (runs / "printed").read_text())
    peaks = {int(rank): int(mib) for rank, mib in found}
    assert len(peaks) == 4
    assert all(peaks[rank] < 0.5 * size for rank in (1, 2, 3)), (size, peaks)
    assert peaks[0] < 2 * size, (size, peaks)


def test_a_process_that_hangs_is_named(tmp_path, start) -> None:
    options = ["training.epochs=2000", "training.save_every=5", "training.timeout=5"]
    process = start("hung", TWO, *options)
    wait_for(tmp_path / "hung/checkpoints/step-00000005", process)
    worker = workers(process)[1]
    os.kill(worker, signal.SIGSTOP)
    told, lines = "error: training.timeout: rank 1 did not answer within 5 s", []
    for line in process.stdout:
        lines.append(line)
        if told in line:
            break
    assert told in lines[-1], "".join(lines)
    os.kill(worker, signal.SIGKILL)  # which torchrun does itself, after 30 s
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_a_killed_worker_restarts_the_group_from_the_newest_checkpoint(runs, tmp_path, start):
    process = start("killed", [*TWO, "--max-restarts=1"], *LONG)
    wait_for(tmp_path / "killed/checkpoints/step-00000005", process)
    os.kill(workers(process)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "resume     step-" in output
    one, two = weights(runs / "undisturbed"), weights(tmp_path / "killed")
    assert all(one[name].equal(two[name]) for name in one)


def test_a_signal_to_torchrun_on_one_machine_saves_on_both_and_is_told_once(tmp_path, start):
    two = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    two.append(f"--master-port={free_port()}")
    more = ["training.epochs=200", "training.save_every=5"]
    agents = [start("stopped", [*two, f"--node-rank={n}"], *more) for n in (0, 1)]
    wait_for(tmp_path / "stopped/checkpoints/step-00000005", agents[0])
    agents[1].terminate()
    output = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    assert output.count("stopped by SIGTERM after step") == 1
    last = metrics(tmp_path / "stopped")[-1]["step"]
    assert (tmp_path / f"stopped/checkpoints/step-{last:08d}/manifest.json").is_file()


def test_an_error_of_one_process_ends_all_and_is_shown_once(tmp_path, start) -> None:
    (tmp_path / "fail.py").write_text(FAIL_ON_RANK_1)
    process = start("fail", TWO, script=tmp_path / "fail.py")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("[rank 1] ZeroDivisionError: on one rank alone") == 1
    assert "closed by peer" not in output
    process = start("bad", TWO, "training.learning_rte=1")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("unknown key; did you mean training.learning_rate?") == 1
    assert "exitcode  : 2" in output
    assert "Traceback" not in output[: output.index("torch/distributed")]


if __name__ == "__main__":
    assert all((bitsandbytes, peft, torchao, LlamaForCausalLM)), "imported once, before the forks"
    torch.set_num_threads(1)
    folder, model, two, four = json.loads(sys.argv[1])
    in_forks(2, train, two)
    copy_killed(Path(folder, "fsdp"), Path(folder, "fsdp-to-four"))
    in_forks(4, load_and_train, model, four)
