"""Seeds, memory and the environment do what their names say."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import torch

from conftest import ROOT
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


def test_dotenv_is_read_before_any_library_and_the_shell_wins(tmp_path):
    code = (
        "import src.utils.environment as e, pathlib, sys\n"
        f"e.PROJECT_ROOT = pathlib.Path({str(tmp_path)!r})\n"
        "e.load_environment()\n"
        "import huggingface_hub.constants as c, os\n"
        "print(c.HF_HOME, os.environ['HF_TOKEN'])"
    )
    (tmp_path / ".env").write_text("HF_HOME=/from/dotenv\nHF_TOKEN=from-dotenv\n")
    env = {k: v for k, v in os.environ.items() if k not in {"HF_HOME", "HF_TOKEN"}}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env | {"HF_TOKEN": "from-shell"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["/from/dotenv", "from-shell"]


def test_the_doctor_judges_and_advises():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/doctor.py")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    assert all(line.startswith(("OK ", "WARN", "FAIL")) for line in done.stdout.splitlines())
    assert "torch" in done.stdout


def test_a_start_imports_neither_a_compiler_nor_what_a_run_may_not_need():
    code = (
        "from src.utils.environment import load_environment\n"
        "from src.utils.imports import quick_imports\n"
        "load_environment()\n"
        "with quick_imports():\n"
        "    import src.training.run, peft\n"
        "from transformers.utils import is_scipy_available\n"
        "import gc, sys, torch\n"
        "slow = {'torch._inductor.compile_fx', 'datasets', 'matplotlib', 'mlflow', 'scipy'}\n"
        "print(*((slow | {'bitsandbytes'}) & set(sys.modules)), gc.isenabled(),"
        "      is_scipy_available(), torch.compile)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("bitsandbytes True True <function compile at"), done.stdout
    assert not done.stderr, "C++ libraries report leaks where frozen objects are not thawed"
