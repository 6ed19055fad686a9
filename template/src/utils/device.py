"""Which device and dtype a run computes with, and autocast to it."""

import os
import re
import subprocess
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

from src.utils.errors import UserError

# The least driver of each major CUDA (NVIDIA's compatibility guide).
LEAST_DRIVER = {"12": 525, "13": 580}
VERSION_FILES = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))
DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"))  # dxg: WSL
SMI = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # sudo drops the second's folder from PATH
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, and the CPU where there is none.

    Raises:
        UserError: torch cannot use a GPU that is there, or `cuda` is wanted and there is none. A
            run that quietly took the CPU instead would be noticed an hour later.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if reason := unusable_gpu():
        raise UserError(f"device: {reason}; device=cpu does without the GPU")
    if wanted == "cuda":
        raise UserError("device: cuda is not available: no NVIDIA GPU here; use device=auto")
    return torch.device("cpu")


def unusable_gpu() -> str | None:
    """Why torch cannot use the NVIDIA GPU of this machine, and the cures; None if there is none.

    Ask only where `torch.cuda.is_available()` is False: forward-compatibility packages make
    drivers work that look too old here.
    """
    driver, wanted = nvidia_driver(), torch.version.cuda
    if driver is None or os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:  # hidden on purpose
        return None
    found, older = f"an NVIDIA GPU is here, with driver {driver}", 'README.md, "An older driver"'
    if wanted is None:
        return f"{found}, but this torch was built without CUDA; for one that has it: {older}"
    least = LEAST_DRIVER.get(wanted.partition(".")[0], 0)
    if int(driver.partition(".")[0]) < least:
        cures = f"install driver {least} or newer, or a torch for an older CUDA: {older}"
        return f"{found}, but this torch wants CUDA {wanted}: {cures}"
    return f"{found}, but torch for CUDA {wanted} cannot start it: see nvidia-smi, then reboot"


def nvidia_driver() -> str | None:
    """The driver of an NVIDIA GPU, such as 550.144.03, without asking torch; None: no such GPU."""
    if os.name == "posix" and not any(path.exists() for path in DEVICE_FILES):
        return None  # a container may show the driver of its host without having the GPU
    for path in VERSION_FILES:
        if path.is_file() and (version := re.search(r"\b\d{3}\.\d[\d.]*", path.read_text())):
            return version[0]
    for command in SMI:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(query, check=True, capture_output=True, text=True, timeout=20)
            if done.stdout.strip():
                return done.stdout.split()[0]
    return None


def cudnn_advice(error: RuntimeError) -> str | None:
    """What to do where an old cuDNN refuses packed attention; None if that is not the error."""
    if "cuDNN Frontend error" not in str(error):
        return None
    found, first = torch.backends.cudnn.version(), str(error).strip().splitlines()[0]
    return (
        f"attention: {first}. torch {torch.__version__} found cuDNN {found}, which is older than "
        "the one it was built with: remove yours from LD_LIBRARY_PATH, so that torch loads its own"
    )


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype that matmuls run in; see `model.dtype` in src/config.py."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cpu":
        return torch.float32
    # including_emulation=False: older GPUs emulate bf16, slower than fp32.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to `dtype`; nothing for fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
