"""Seeds, memory and device do what their names say."""

import random
import sys
from unittest import mock

import numpy as np
import pynvml
import pytest
import torch

from src.utils import device, memory
from src.utils.device import pick_device, pick_dtype
from src.utils.errors import UserError
from src.utils.memory import clear_memory, gpu_memory, print_gpu_memory
from src.utils.seed import set_seed


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(2).tolist()  # noqa: NPY002


def test_one_seed_gives_one_sequence_in_every_generator():
    set_seed(5)
    first = draw()
    set_seed(5)
    assert draw() == first
    set_seed(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_deterministic_means_all_of_torch_not_cudnn_alone():
    try:
        set_seed(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_memory_is_honest_on_a_machine_without_cuda(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_memory() == {}
    print_gpu_memory("after loading")
    clear_memory()
    assert capsys.readouterr().out == "after loading: no CUDA device\n"


def test_a_process_asks_its_own_gpu_alone_for_its_memory(capsys, monkeypatch):
    asked, sizes = [], dict.fromkeys(("allocated", "reserved", "peak", "free", "total"), 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(memory, "gpu_memory", lambda index: asked.append(index) or sizes)
    print_gpu_memory("memory", torch.device("cuda", 3))
    assert asked == [3]
    print_gpu_memory("memory")
    assert asked[1:] == [*range(8)]
    assert capsys.readouterr().out.startswith("memory: cuda:3 allocated 1.00 GiB")


@pytest.mark.parametrize("native", [True, False])
def test_the_dtype_is_one_that_the_device_computes_in(monkeypatch, native: bool):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float16)
    assert pick_dtype("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.fixture
def old_gpu(monkeypatch, tmp_path) -> dict:
    """A machine with an NVIDIA GPU whose driver is too old, as NVML shows it."""
    facts = {"SystemGetDriverVersion": "550.144.03", "DeviceGetCount": 1, "Init": None}
    for name in facts:
        monkeypatch.setattr(pynvml, f"nvml{name}", lambda name=name: facts[name])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(device, "DEVICE_FILES", (tmp_path,))
    return facts


def test_a_gpu_that_torch_cannot_use_is_not_passed_over(old_gpu, monkeypatch) -> None:
    def refused(name: str, match: str) -> None:
        with pytest.raises(UserError, match=match):
            pick_device(name)

    for name in ("auto", "cuda"):
        refused(name, r"driver 550.144.03, .*CUDA 13.2: install driver 580")
    assert pick_device("cpu").type == "cpu"
    old_gpu["SystemGetDriverVersion"] = "580.95.05"
    refused("auto", "cannot start it: see nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    refused("auto", "built without CUDA")
    mismatch = pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
    monkeypatch.setattr(pynvml, "nvmlInit", mock.Mock(side_effect=mismatch))
    refused("auto", r"its driver does not answer \(RM has detected .*reboot")


def test_a_machine_without_a_gpu_trains_on_the_cpu(old_gpu, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden from this process
    assert pick_device("auto").type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    old_gpu["DeviceGetCount"] = 0
    assert pick_device("auto").type == "cpu"
    absent = pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    monkeypatch.setattr(pynvml, "nvmlInit", mock.Mock(side_effect=absent))
    monkeypatch.setattr(device, "DEVICE_FILES", ())  # a container with the library of its host
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no NVIDIA GPU here"):
        pick_device("cuda")


def test_a_system_that_is_not_supported_is_named_in_one_line(refused, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    (line,) = refused(lambda _: pytest.fail("nothing is started"))
    assert line.startswith("this system, win32, is not supported: use Linux, WSL2, or macOS")
