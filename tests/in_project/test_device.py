"""A GPU that torch cannot use is named, and no run quietly takes the CPU instead."""

from unittest import mock

import pynvml
import pytest
import torch

from src.utils import device
from src.utils.device import pick_device
from src.utils.errors import UserError


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
        refused(name, r"CUDA 13.2 cannot use the NVIDIA GPU here, with driver 550.144.03: see")
    assert pick_device("cpu").type == "cpu"
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
