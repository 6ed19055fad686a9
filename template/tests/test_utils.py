"""Seeds, memory and device do what their names say."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from src.utils import device
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


def test_deterministic_means_all_of_torch_not_cudnn_alone(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        set_seed(1, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False


def test_memory_is_honest_on_a_machine_without_cuda(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_memory() == {}
    print_gpu_memory("after loading")
    clear_memory()
    assert capsys.readouterr().out == "after loading: no CUDA device\n"


@pytest.mark.parametrize("native", [True, False])
def test_the_dtype_is_one_that_the_device_computes_in(monkeypatch, native: bool):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float16)
    assert pick_dtype("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.fixture
def old_gpu(monkeypatch, tmp_path) -> Path:
    """A machine with an NVIDIA GPU whose driver is too old, as its files show it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    version, node = tmp_path / "version", tmp_path / "nvidia0"
    version.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.144.03  Wed\nGCC 12.2.0\n"
    )
    node.touch()
    monkeypatch.setattr(device, "VERSION_FILES", (tmp_path / "absent", version))
    monkeypatch.setattr(device, "DEVICE_FILES", (node,))
    return version


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_whose_driver_is_too_old_is_not_passed_over(old_gpu, wanted) -> None:
    with pytest.raises(UserError, match=r"driver 550.144.03, .*CUDA 13.2: install driver 580"):
        pick_device(wanted)
    assert pick_device("cpu").type == "cpu"


def test_a_torch_without_cuda_and_a_gpu_that_does_not_start_are_told_apart(
    old_gpu, monkeypatch
) -> None:
    old_gpu.write_text("580.95.05\n")
    with pytest.raises(UserError, match="cannot start it: see nvidia-smi"):
        pick_device("auto")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="built without CUDA"):
        pick_device("auto")


def test_the_driver_is_asked_for_where_no_file_names_it(old_gpu, monkeypatch, tmp_path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 535.12\necho 535.12\n")
    smi.chmod(0o755)
    old_gpu.unlink()
    monkeypatch.setattr(device, "SMI", (str(tmp_path / "absent"), str(smi)))
    assert device.nvidia_driver() == "535.12"


def test_a_machine_without_a_gpu_trains_on_the_cpu(old_gpu, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden from this process
    assert pick_device("auto").type == "cpu"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(device, "DEVICE_FILES", ())  # a container that shows its host's driver
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="no NVIDIA GPU here"):
        pick_device("cuda")
