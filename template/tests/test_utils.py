"""Seeds, memory and device do what their names say."""

import random

import numpy as np
import pytest
import torch

from src.utils import memory
from src.utils.device import pick_dtype
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
