"""The doctor: each of its checks in health, and with the problem that it is there for."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from unittest import mock

import bitsandbytes.functional
import pynvml
import pytest
import torch

import scripts.doctor
from conftest import SMOKE, chat
from src.config import Config, from_command_line
from src.tools import doctor
from src.tools.doctor import Finding
from src.training import fit
from src.training.plan import CannotPlan, Plan
from src.utils import device
from src.utils.memory import GIB

CPU = torch.device("cpu")
AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@b")


def configured(*overrides: str) -> Config:
    return from_command_line([SMOKE, *overrides])[0]


def problems(findings: Iterable[Finding]) -> list[str]:
    """What is not OK, each with its verdict."""
    return [f"{each.verdict} {each.text}" for each in findings if each.verdict != "OK"]


# --- machine


@pytest.fixture
def four_bit(saved_model) -> Config:
    keys = ("lora.r=4", "model.quantization=4bit", "model.init=pretrained", "device=cpu")
    return configured(f"model.name={saved_model}", *keys)


def test_a_machine_without_a_gpu_suits_a_small_model(four_bit, monkeypatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    *_, finding = doctor._check_machine(four_bit)
    assert finding == ("OK", "tried torch.float32 matmul on cpu, 4-bit quantization", "")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # and nothing is compiled, as in an image
    monkeypatch.setattr(doctor, "cache_from_source", lambda _: "absent")
    (finding,) = (each for each in doctor._check_machine(four_bit) if each.verdict != "OK")
    assert finding.text.startswith("PYTHONDONTWRITEBYTECODE is set, and packages are not compiled")
    assert finding.fix == "UV_COMPILE_BYTECODE=1 uv sync"


def test_a_run_that_this_device_cannot_do_fails(monkeypatch) -> None:
    def failure(*overrides: str) -> str:
        return problems(dict(doctor.examine(configured(*overrides)))["machine"])[-1]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert failure("device=cuda").startswith("FAIL device: cuda is not available")
    monkeypatch.setattr(fit, "count_before_loading", lambda _: 8_000_000_000)
    assert failure().startswith("FAIL device: no GPU here, and")
    monkeypatch.setattr(device, "unusable_gpu", lambda: "a GPU is here, but its driver …")
    assert failure().startswith("FAIL device: a GPU is here, but its driver …")


def test_operations_that_do_not_run_fail(four_bit, monkeypatch) -> None:
    no_kernel = mock.Mock(side_effect=RuntimeError("no kernel image is available\nmore"))
    assert doctor._check_operations(four_bit, CPU, torch.bfloat16).verdict == "OK"
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", no_kernel)
    text = "torch.float32 matmul on cpu, 4-bit quantization: no kernel image is available"
    assert doctor._check_operations(four_bit, CPU, torch.float32)[:2] == ("FAIL", text)
    assert doctor._check_operations(configured(), CPU, torch.float32).verdict == "OK"
    monkeypatch.setattr(torch, "ones", no_kernel)
    assert doctor._check_operations(configured(), CPU, torch.float32).verdict == "FAIL"


def test_a_gpu_that_is_shared_slowed_or_old_is_named(monkeypatch) -> None:
    gpu = mock.Mock()
    gpu.get_device_name.return_value = "H100"
    gpu.mem_get_info.return_value = (70 * GIB, 80 * GIB)
    nvml = mock.Mock(NVMLError=pynvml.NVMLError)
    nvml.nvmlSystemGetDriverVersion.return_value = "580.1"
    nvml.nvmlDeviceGetComputeRunningProcesses.return_value = []
    nvml.nvmlDeviceGetCurrentClocksEventReasons.return_value = 0x4  # a power cap
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(doctor, "pynvml", nvml)
    healthy = [("OK", "GPU 0, H100: 70.0 of 80.0 GiB free", ""), ("OK", "driver 580.1", "")]
    assert [*doctor._check_gpu(0)] == healthy
    gpu.is_bf16_supported.return_value = False
    nvml.nvmlDeviceGetComputeRunningProcesses.return_value = [SimpleNamespace(pid=1)]
    nvml.nvmlDeviceGetCurrentClocksEventReasons.return_value = 0x40
    assert problems(doctor._check_gpu(0)) == [
        "WARN GPU 0, H100 has no bf16: training uses fp16 with a loss scaler",
        "WARN GPU 0, H100 is also used by process 1",
        "WARN GPU 0, H100 runs at lowered clocks",
    ]
    nvml.nvmlDeviceGetHandleByUUID.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert problems(doctor._check_gpu(0))[1].endswith("Not Supported")


# --- project


def test_a_project_without_git_or_with_changes_or_a_leaked_secret_is_named(
    tmp_path, monkeypatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", *AUTHOR, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(doctor, "PROJECT_ROOT", tmp_path)
    assert problems(doctor._check_project()) == [
        "WARN no git repository: a run cannot record its code"
    ]
    git("init")
    git("commit", "--allow-empty", "-m", "x")
    assert [finding.verdict for finding in doctor._check_project()] == ["OK"]
    (tmp_path / ".env").write_text("HF_TOKEN=x\n")
    (line,) = problems(doctor._check_project())
    assert line.startswith("WARN uncommitted files: 1")
    git("add", ".env")
    git("commit", "-m", "y")
    git("rm", ".env")
    git("commit", "-m", "z")
    assert problems(doctor._check_project()) == ["WARN .env is in `git log --all -- .env`"]
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # "dubious ownership"
    (finding,) = doctor._check_project()
    assert finding.text == "`git status` fails: a run cannot record its code"
    assert finding.fix.endswith(f"git config --global --add safe.directory {tmp_path}")


# --- data and template


@pytest.fixture
def look(write_rows) -> Callable[..., list[Finding]]:
    """Check rows: `look(row, …, template="…", overrides=[…])`."""

    def check(*rows: dict | str, template: str = "", overrides: tuple[str, ...] = ()):
        keys = [f"data.train={write_rows(*rows)}", *overrides]
        if template:
            keys.append(f"model.chat_template={write_rows(template, name='chat.j2')}")
        return list(dict(doctor.examine(configured("data.eval=null", *keys)))["data and template"])

    return check


GOOD = [chat(f"q{n}", f"a{n}") for n in range(8)]
LONG = chat("q", "w " * 200)
ONLY_TEXT = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_rows_in_order_have_no_warning(look, write_rows) -> None:
    other = write_rows(chat("new", "b"), name="eval.jsonl")
    findings = look(*GOOD, overrides=(f"data.eval={other}",))
    assert not problems(findings)
    assert findings[-1].text == "8 of 8 documents teach a stop token"


@pytest.mark.parametrize(
    ("rows", "template", "overrides", "expected"),
    [
        (GOOD, "", (), "WARN no rows to evaluate on"),
        (GOOD, "{{ bos_token }}" * 2 + ONLY_TEXT, (), "FAIL documents begin with two BOS tokens"),
        ([LONG], "", (), "FAIL 0 of 1 documents teach a stop token"),
        ([*GOOD, LONG], "", (), "WARN 8 of 9 documents teach a stop token"),
        (GOOD, "", ("data.eval=SAME",), "WARN 8 documents of data.eval are in data.train too"),
        (["{"], "", (), "rows.jsonl:1: "),
        (GOOD, "", ("model.name=configs/none",), "FAIL model.name: configs/none: no such folder"),
    ],
)
def test_each_problem_of_rows_is_named(look, tmp_path, rows, template, overrides, expected) -> None:
    overrides = tuple(word.replace("SAME", str(tmp_path / "rows.jsonl")) for word in overrides)
    lines = problems(look(*rows, template=template, overrides=overrides))
    assert sum(expected in line for line in lines) == 1, lines


def test_a_missing_bos_token_that_the_tokenizer_would_add_is_named(look, monkeypatch) -> None:
    tokenizer = doctor.load_tokenizer(configured().model)
    tokenizer.add_bos_token, tokenizer.chat_template = True, ONLY_TEXT + "{{ eos_token }}"
    monkeypatch.setattr(doctor, "load_tokenizer", lambda _: tokenizer)
    lines = problems(look(*GOOD))
    assert any("WARN no document begins with <|begin|>" in line for line in lines), lines


# --- memory


def test_a_plan_that_does_not_fit_names_the_cheapest_change(monkeypatch) -> None:
    config, planned = configured("device=auto"), Plan(2.0, 1.0, 2.0, 4.0)
    monkeypatch.setattr(doctor, "cheapest_that_fits", lambda *_: ("data.max_length=64", 8.0))

    def check(plan: Plan, total: float, free: float) -> Finding:
        return doctor._check_memory(config, plan, {"total": total, "free": free})

    assert check(planned, 10.1, 80.0).verdict == "OK"
    busy = "a step needs 10.00 of 80.0 GiB here, and only 8.5 GiB are free now"
    assert check(planned, 80.0, 8.5)[:2] == ("WARN", busy)
    small = ("FAIL", "a step needs 10.00 of 8.0 GiB here", "data.max_length=64: 8.0 GiB")
    assert check(planned, 8.0, 8.0) == small
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert doctor._gpus_to_share(configured("training.strategy=ddp")) == 1
    assert doctor._gpus_to_share(configured("training.optimizer=adamw8bit")) == 1
    large = Plan(weights=90.0, gradients=0, moments=30.0, activations=20.0)
    shared = "a step needs 36.00 of 80.0 GiB on each GPU, with torchrun --nproc-per-node=8"
    assert check(large, 80.0, 79.0)[:2] == ("OK", shared)


def test_a_disk_without_room_for_the_checkpoints_fails(monkeypatch, tmp_path) -> None:
    config, planned = configured(f"output_dir={tmp_path / 'not/yet/there'}"), Plan(9, 1, 2, 9)
    for free, verdict in ((4 * 3 + 1.1, "OK"), (4 * 3 + 0.9, "FAIL")):
        usage = SimpleNamespace(free=free * GIB)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, usage=usage: usage)
        finding = doctor._check_disk(config, planned)
        assert finding.verdict == verdict
    assert str(tmp_path) in finding.text


# --- the page


def test_the_page_has_four_parts_and_fails_with_one_of_them(capsys, monkeypatch, refused) -> None:
    def page(*arguments: str, fails: bool = False) -> str:
        with pytest.raises(SystemExit, match=str(fails)):
            scripts.doctor.main([SMOKE, "device=cpu", *arguments])
        return capsys.readouterr().out

    monkeypatch.setattr(doctor, "git", lambda *words: "")  # whatever this checkout is like
    marks = ("  OK    ", "  WARN  ", "        → ")
    parts = [line for line in page().splitlines() if not line.startswith(marks)]
    assert parts == ["machine", "project", "data and template", "memory and disk"]
    failed = page("data.train=gone", "model.name=org/name", "model.init=pretrained", fails=True)
    assert "data and template\n  FAIL  " in failed
    assert failed.count("is not on this machine") == 1
    assert "HF_HUB_OFFLINE is set" in failed
    assert failed.endswith("memory and disk\n  FAIL  see above\n")
    unplanned = mock.Mock(side_effect=CannotPlan("x cannot be planned: …"))
    monkeypatch.setattr(doctor, "plan_for", unplanned)
    assert "WARN  no plan: x cannot be planned: …" in page()
    assert refused(scripts.doctor.main, SMOKE, "sed=1")[0].startswith("command line: sed: ")
