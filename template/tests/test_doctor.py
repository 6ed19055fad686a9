"""The doctor: each of its lines in health, and with the problem that it is there for."""

import http.server
import json
import runpy
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional
import pynvml
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import scripts.doctor
from conftest import SMOKE, chat
from src.config import Config, from_command_line
from src.doctor import Finding, machine, memory, project, rows
from src.training import feasibility
from src.training.plan import Plan, plan
from src.utils import device
from src.utils.memory import GIB

FILES = {
    ".gitignore": ".env\n",
}
WHO = ("-c", "user.name=a", "-c", "user.email=a@b")


def configured(*overrides: str) -> Config:
    return from_command_line([SMOKE, *overrides])[0]


def wrong(findings: Iterable[Finding]) -> list[str]:
    """What is not OK, each with its verdict."""
    return [f"{each.verdict} {each.what}" for each in findings if each.verdict != "OK"]


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(configured("device=cpu"))


# --- machine


def test_a_package_that_is_missing_is_named(monkeypatch) -> None:
    (found,) = machine._environment()
    assert found.verdict == "OK"
    known = machine.version

    def absent(name: str) -> str:
        return known("no-such-package" if name == "peft" else name)

    monkeypatch.setattr(machine, "version", absent)
    assert wrong(machine._environment()) == ["FAIL peft is not installed"]


@pytest.fixture
def four_bit(saved_model) -> Config:
    words = ("lora.r=4", "model.quantization=4bit", "model.init=pretrained")
    return configured(f"model.name={saved_model}", *words)


def test_a_machine_without_a_gpu_suits_a_small_model(planned, four_bit, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(machine.check_machine(four_bit, planned))
    assert not wrong(found)
    said = " ".join(each.what for each in found)
    for part in ("needs none", "seed=42 repeats it", "4 bits on cpu", "GiB free for 4 checkpoints"):
        assert part in said
    unknown = wrong(machine.check_machine(configured(), None))
    assert unknown == ["WARN no GPU here, and this model may need one"]


def test_a_run_that_this_device_cannot_do_fails(planned, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = wrong(machine.check_machine(configured("device=cuda"), planned))
    assert line.startswith("FAIL device: cuda is not available")
    monkeypatch.setattr(feasibility, "count_before_loading", lambda _: 8_000_000_000)
    (line,) = wrong(machine.check_machine(configured(), planned))
    assert line.startswith("FAIL device: no GPU here, and")
    monkeypatch.setattr(device, "unusable_gpu", lambda: "a GPU is here, but its driver …")
    (line,) = wrong(machine.check_machine(configured(), planned))
    assert line.startswith("FAIL device: a GPU is here, but its driver …")


def test_operations_that_fail_or_do_not_repeat_are_told(four_bit, monkeypatch) -> None:
    here, four = torch.device("cpu"), four_bit
    assert not wrong(machine._operations(four, here, torch.bfloat16))
    with monkeypatch.context() as patch:
        patch.setattr(machine, "set_seed", lambda _: None)
        (line,) = wrong(machine._operations(four, here, torch.float32))
        assert line == "FAIL seed=42 does not repeat a product"
    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda weight, state: 9.0)
        (line,) = wrong(machine._operations(four, here, torch.float32))
        assert line.startswith("FAIL bitsandbytes does not work: 4 bits are off by")

    def no_kernel(*arguments: object, **options: object) -> None:
        raise RuntimeError("no kernel image is available\nmore")

    monkeypatch.setattr(machine, "_product", no_kernel)
    (line,) = wrong(machine._operations(four, here, torch.float32))
    assert line == "FAIL float32 on cpu: no kernel image is available"
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", no_kernel)
    (line,) = wrong(machine._four_bits(four, here))
    assert line.endswith("RuntimeError: no kernel image is available")
    (line,) = wrong(machine._four_bits(configured(), here))
    assert line.startswith("WARN"), "this config does not use it"


def test_a_disk_without_room_for_the_checkpoints_fails(planned, monkeypatch, tmp_path) -> None:
    config = configured(f"output_dir={tmp_path / 'not/yet/there'}")
    assert not wrong(machine._disk(config, planned))
    each = planned.gradients + planned.moments
    assert each > 0
    for checkpoints, verdict in ((6, "OK"), (3.9, "FAIL")):
        free = SimpleNamespace(free=checkpoints * each * GIB)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _, free=free: free)
        (found,) = machine._disk(config, planned)
        assert found.verdict == verdict
    assert str(tmp_path) in found.mend


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """A healthy GPU that exists only here, and what NVML says of it."""
    its = SimpleNamespace(processes=[], reasons=0x4, limit=700_000, usual=700_000, bf16=True)
    properties = SimpleNamespace(uuid="1-2")
    for name, value in {
        "get_device_name": lambda _: "H100",
        "mem_get_info": lambda _: (70 * GIB, 80 * GIB),
        "is_bf16_supported": lambda including_emulation: its.bf16,
        "get_device_properties": lambda _: properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: its if uuid == "GPU-1-2" else None,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: handle.processes,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: handle.reasons,
        "nvmlDeviceGetPowerManagementLimit": lambda handle: handle.limit,
        "nvmlDeviceGetPowerManagementDefaultLimit": lambda handle: handle.usual,
    }.items():
        monkeypatch.setattr(pynvml, name, value)
    return its


def test_a_gpu_that_is_shared_slowed_or_old_is_told(gpu, monkeypatch) -> None:
    (found,) = machine._gpu(0)
    assert (found.verdict, found.what.partition(";")[0]) == (
        "OK", "GPU 0, H100: 70.0 of 80.0 GiB free"
    )  # fmt: skip
    gpu.processes = [SimpleNamespace(pid=1, usedGpuMemory=3 * GIB)]
    gpu.reasons, gpu.limit, gpu.bf16 = 0x40, 350_000, False
    assert wrong(machine._gpu(0)) == [
        "WARN GPU 0, H100 has no bf16: training uses fp16 with a loss scaler",
        "WARN process 1 holds 3.0 GiB of GPU 0, H100",
        "WARN GPU 0, H100 is slow: it is too hot",
        "WARN GPU 0, H100 may draw 350 W of its usual 700",
    ]

    def silent(handle: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", silent)
    assert wrong(machine._gpu(0))[1].endswith("Not Supported")


# --- project


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", *WHO, *words], cwd=root, check=True, capture_output=True)


def commit(root: Path, *names: str) -> None:
    git(root, "add", "-f", *(names or ["-A"]))
    git(root, "commit", "-m", "x")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(project, "_unsent", lambda outputs: iter(()))  # of this very project
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git(tmp_path, "init")
    commit(tmp_path)
    return tmp_path


def test_a_project_in_order_has_no_warning(repository) -> None:
    found = list(project.check_project(configured(), repository))
    assert not wrong(found)
    assert len(found) == 3


def _leak(root: Path) -> None:
    (root / ".env").write_text("HF_TOKEN=x\n")
    commit(root, ".env")
    git(root, "rm", "--cached", ".env")
    git(root, "commit", "-m", "y")


def _track(root: Path) -> None:
    (root / ".env").write_text("HF_TOKEN=x\n")
    commit(root, ".env")


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).write_text(text)
        commit(root)

    return write


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "new.py").touch(), "WARN new.py is not committed"),
        (_write(".gitignore", "x\n"), "FAIL .env is not ignored by git"),
        (_track, "FAIL .env is in git"),
        (_leak, "WARN .env was committed once"),
    ],
)
def test_each_disorder_of_a_project_is_told(repository, damage, expected) -> None:
    damage(repository)
    found = wrong(project.check_project(configured(), repository))
    assert any(expected in line for line in found), found


def test_a_folder_without_a_commit_is_told(tmp_path) -> None:
    assert wrong(project.check_project(configured(), tmp_path))[-1] == (
        "WARN no commit here: no run will know its code"
    )


class Healthy(http.server.BaseHTTPRequestHandler):
    """Says of itself what MLflow's server does."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_runs_that_would_not_be_recorded_are_told(monkeypatch) -> None:
    (line,) = wrong(project._tracking(configured("tracking.enabled=false")))
    assert line == "WARN runs are not recorded in MLflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    (line,) = wrong(project._tracking(configured()))
    assert line == "WARN MLflow's server, MLFLOW_TRACKING_URI, does not answer"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://user:pass@127.0.0.1:{server.server_port}/"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        (found,) = project._tracking(configured())
        server.shutdown()
    assert found.verdict == "OK"


def test_runs_that_mlflow_lacks_are_named(tmp_path) -> None:
    def run(name: str, **facts: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(facts))

    assert not list(project._unsent(tmp_path))
    run("a", status="FINISHED", sent="FINISHED")
    run("b", status="RUNNING")
    assert not wrong(project._unsent(tmp_path))
    run("c", status="FAILED")
    (found,) = project._unsent(tmp_path)
    assert found.what.startswith("1 of 2 runs that have ended are not in MLflow")
    assert found.mend == f"uv run scripts/sync.py {tmp_path / 'c'}"


def test_a_conflict_in_code_that_is_imported_is_one_line(tmp_path, refused) -> None:
    def main(_: list[str]) -> None:
        (tmp_path / "config.py").write_text(f"x = 1\n{'<' * 7} before updating\n")
        runpy.run_path(str(tmp_path / "config.py"))

    (line,) = refused(main)
    assert line == f"{tmp_path / 'config.py'}:2: invalid syntax: {'<' * 7} before updating"


# --- data and template


@pytest.fixture
def looked(write_rows) -> Callable[..., list[Finding]]:
    """What is said of rows: `looked(row, …, template="…", overrides=[…])`."""

    def look(*some: dict | str, template: str = "", overrides: tuple[str, ...] = ()):
        words = [f"data.train={write_rows(*some)}", *overrides]
        if template:
            words.append(f"model.chat_template={write_rows(template, name='chat.j2')}")
        return list(rows.check_rows(configured("data.eval=null", *words), ("[", "]"), ""))

    return look


GOOD = [chat(f"q{n}", f"a{n}") for n in range(8)]
LONG = chat("q", "w " * 200)
ONLY_TEXT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_rows_in_order_have_no_warning(looked, write_rows) -> None:
    other = write_rows(chat("new", "b"), name="eval.jsonl")
    found = looked(*GOOD, overrides=(f"data.eval={other}",))
    assert not wrong(found)
    said = [each.what for each in found]
    assert said[0].startswith("the first: <|begin|>### User:\nq0")
    assert "[a0<|end|>]" in said[0]
    assert said[1:3] == [
        "8 of 8 documents begin with one BOS token, none with two",
        "8 of 8 documents teach a stop token ('<|end|>')",
    ]
    assert said[-1] == "no document of data.eval is in data.train"


@pytest.mark.parametrize(
    ("some", "template", "overrides", "expected"),
    [
        (GOOD, "", (), "WARN nothing is evaluated on"),
        (GOOD, "{{ bos_token }}" * 2 + ONLY_TEXT, (), "8 documents begin with two BOS tokens"),
        ([LONG], "", (), "FAIL 0 of 1 documents teach a stop token"),
        ([*GOOD, LONG], "", (), "WARN 8 of 9 documents teach a stop token"),
        ([*GOOD, GOOD[0]], "", (), "WARN data.train: 1 documents repeat another one"),
        ([*GOOD, chat("q", "")], "", (), "WARN data.train: 1 rows left out"),
        ([*GOOD, chat("q", "")], "", ("data.eval=0.2",), "WARN data.train: 1 rows left out"),
        ([*GOOD, LONG], "", (), "WARN data.train: 1 rows cut"),
        (GOOD, "", ("data.eval=SAME",), "8 of 8 documents of data.eval are in data.train"),
        (["{"], "", (), "rows.jsonl:1: "),
        (GOOD, "", ("model.name=configs/none",), "FAIL model.name: configs/none: no such folder"),
    ],
)  # fmt: skip
def test_each_trouble_of_rows_is_told(
    looked, tmp_path, some, template, overrides, expected
) -> None:
    overrides = tuple(word.replace("SAME", str(tmp_path / "rows.jsonl")) for word in overrides)
    found = wrong(looked(*some, template=template, overrides=overrides))
    assert sum(expected.removeprefix("WARN data.train: ") in line for line in found) == 1, found


def test_documents_longer_than_the_models_positions_fail(looked, tmp_path, tokenizer) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", vocab_size=512, **sizes))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    base = (f"model.name={tmp_path / 'gpt2'}", "model.init=pretrained", "lora.r=4")
    (line,) = wrong(looked(*GOOD, overrides=base))
    assert line.startswith("FAIL data.max_length: 128 is more than the 64 positions")


def test_a_beginning_that_the_tokenizer_would_give_is_missed(looked, monkeypatch) -> None:
    load = rows.load_tokenizer

    def with_bos(config):
        tokenizer = load(config)
        tokenizer.add_bos_token = True
        return tokenizer

    monkeypatch.setattr(rows, "load_tokenizer", with_bos)
    found = wrong(looked(*GOOD, template=ONLY_TEXT + "{{ eos_token }}"))
    assert any("WARN no document begins with <|begin|>" in line for line in found), found


# --- memory plan


def test_a_plan_that_does_not_fit_names_the_cheapest_change(planned, monkeypatch) -> None:
    config = configured("device=auto")
    monkeypatch.setattr(
        memory, "gpu_memory", lambda: {"total": 1.01 * planned.peak_gib, "free": 80.0}
    )
    (found,) = memory.check_memory(config, planned, "")
    assert found.verdict == "OK"
    assert "on this GPU: weights" in found.what
    taken = {"total": 80.0, "free": 0.01}
    monkeypatch.setattr(memory, "gpu_memory", lambda: taken)
    assert wrong(memory.check_memory(config, planned, "")) == [
        "WARN only 0.0 GiB of this GPU are free now"
    ]
    short = planned.peak_gib - 0.2 * planned.activations
    monkeypatch.setattr(memory, "gpu_memory", lambda: {"total": short, "free": short})
    (found,) = memory.check_memory(config, planned, "")
    assert found.verdict == "FAIL"
    assert "=" in found.mend
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert memory.sharing_gpus(configured("training.strategy=ddp")) == 1
    assert memory.sharing_gpus(configured("training.optimizer=adamw8bit")) == 1
    large = Plan(weights=90.0, gradients=0, moments=30.0, activations=20.0)
    monkeypatch.setattr(memory, "gpu_memory", lambda: {"total": 80.0, "free": 79.0})
    (found,) = memory.check_memory(config, large, "")
    assert found.verdict == "OK"
    assert found.what.startswith("36.00 GiB at the peak, of 80.0 on this GPU by torchrun --nproc")
    (found,) = memory.check_memory(config, None, "why")
    assert (found.verdict, found.what) == ("WARN", "no plan: why")


# --- the page


def run(capsys, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        scripts.doctor.main([*arguments])
    return int(end.value.code or 0), capsys.readouterr().out


def test_the_page_has_four_parts_and_fails_with_one_of_them(capsys, monkeypatch, refused) -> None:
    monkeypatch.setattr(project, "git", lambda *words: None)  # whatever this checkout is like
    code, page = run(capsys, SMOKE, "device=cpu")
    assert code == 0
    heads = [line for line in page.splitlines() if line and not line.startswith(" ")]
    assert heads == ["machine", "project", "data and template", "memory plan"]
    assert all(
        line.startswith(("  OK    ", "  WARN  ", "        → "))
        for line in page.splitlines()
        if line and line not in heads
    )
    code, page = run(capsys, SMOKE, "device=cpu", "data.train=gone.jsonl", "--json")
    assert code == 1
    told = json.loads(page)
    assert list(told) == heads
    assert told["data and template"][0]["verdict"] == "FAIL"
    assert refused(scripts.doctor.main, SMOKE, "sed=1")[0].startswith("command line: sed: ")


def test_a_model_that_cannot_be_had_is_told_once(capsys, monkeypatch) -> None:
    code, page = run(capsys, SMOKE, "device=cpu", "model.name=org/name", "model.init=pretrained")
    assert code == 1
    assert page.count("is not on this machine and could not be fetched") == 1
    assert "WARN  no plan: see above" in page

    def unknown(config: Config) -> None:
        raise NotImplementedError

    monkeypatch.setattr("src.training.plan.plan", unknown)
    _, page = run(capsys, SMOKE, "device=cpu")
    assert "WARN  no plan: NotImplementedError in walking this model" in page
