"""What the doctor finds on machines, templates and plans that an owner seldom meets."""

from types import SimpleNamespace
from unittest import mock

import bitsandbytes.functional
import pynvml
import pytest
import torch

from src.config import Config
from src.tools import doctor
from src.tools.doctor import Finding
from src.training.plan import Plan
from src.utils.memory import GIB
from test_doctor import configured, problems

CPU = torch.device("cpu")


@pytest.fixture
def four_bit(saved_model) -> Config:
    keys = ("lora.r=4", "model.quantization=4bit", "model.init=pretrained", "device=cpu")
    return configured(f"model.name={saved_model}", *keys)


def test_operations_that_do_not_run_fail(four_bit, monkeypatch) -> None:
    no_kernel = mock.Mock(side_effect=RuntimeError("no kernel image is available\nmore"))
    assert doctor._check_operations(four_bit, CPU, torch.bfloat16).verdict == "OK"
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", no_kernel)
    finding = doctor._check_operations(four_bit, CPU, torch.float32)
    assert finding.verdict == "FAIL"
    assert finding.text.endswith("4-bit quantization: RuntimeError: no kernel image is available")
    assert doctor._check_operations(configured(), CPU, torch.float32).verdict == "OK"
    monkeypatch.setattr(torch, "ones", no_kernel)
    assert doctor._check_operations(configured(), CPU, torch.float32).verdict == "FAIL"


def test_a_gpu_that_is_shared_or_slowed_is_named(monkeypatch) -> None:
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
    nvml.nvmlDeviceGetComputeRunningProcesses.return_value = [SimpleNamespace(pid=1)]
    nvml.nvmlDeviceGetCurrentClocksEventReasons.return_value = 0x40
    assert problems(doctor._check_gpu(0)) == [
        "WARN GPU 0, H100 is also used by process 1",
        "WARN GPU 0, H100 runs at lowered clocks",
    ]
    nvml.nvmlDeviceGetHandleByUUID.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert problems(doctor._check_gpu(0))[0].endswith("Not Supported")


def test_a_plan_that_does_not_fit_names_the_cheapest_change(monkeypatch) -> None:
    config, planned = configured("device=auto"), Plan(2.0, 1.0, 2.0, 4.0)
    monkeypatch.setattr(doctor, "cheapest_that_fits", lambda *_: ("data.max_length=64", 8.0))

    def check(plan: Plan, total: float) -> Finding:
        return doctor._check_memory(config, plan, total)

    assert check(planned, 10.1).verdict == "OK"
    small = ("FAIL", "a step needs 10.00 of 8.0 GiB here", "data.max_length=64: 8.0 GiB")
    assert check(planned, 8.0) == small
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert doctor._gpus_to_share(configured("training.strategy=ddp")) == 1
    assert doctor._gpus_to_share(configured("training.optimizer=adamw8bit")) == 1
    large = Plan(weights=90.0, gradients=0, moments=30.0, activations=20.0)
    shared = "a step needs 36.00 of 80.0 GiB on each GPU, with torchrun --nproc-per-node=8"
    assert check(large, 80.0)[:2] == ("OK", shared)


def test_a_disk_without_room_for_the_checkpoints_fails(monkeypatch, tmp_path) -> None:
    config, planned = configured(f"output_dir={tmp_path / 'not/yet/there'}"), Plan(9, 1, 2, 9)
    for free, verdict in ((4 * 3 + 1.1, "OK"), (4 * 3 + 0.9, "FAIL")):
        usage = SimpleNamespace(free=free * GIB)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, usage=usage: usage)
        finding = doctor._check_disk(config, planned)
        assert finding.verdict == verdict
    assert str(tmp_path) in finding.text
