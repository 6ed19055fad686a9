"""Which device and dtype a run computes with, and autocast to it."""

import os
from pathlib import Path

import pynvml
import torch

from src.utils.errors import UserError
from src.utils.ranks import LOCAL_RANK

DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"))  # of any NVIDIA GPU, except in WSL
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, for each process its own, and else the CPU.

    Raises:
        UserError: torch cannot use the GPU of this machine, or `cuda` is set and there is none. A
            run that quietly took the CPU instead would be noticed an hour later.
    """
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", LOCAL_RANK)
    if reason := unusable_gpu():
        raise UserError(f"device: {reason}; device=cpu trains without the GPU")
    if name == "cuda":
        raise UserError("device: cuda is not available: no NVIDIA GPU here; use device=auto")
    return torch.device("cpu")


def unusable_gpu() -> str | None:
    """The reason why torch cannot use the NVIDIA GPU of this machine; None if there is none.

    Ask only where `torch.cuda.is_available()` is False: forward-compatibility packages make
    drivers work that look too old here.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:  # hidden on purpose
        return None
    try:
        pynvml.nvmlInit()
        driver, count = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:  # a container may have the library without a GPU
        problem = f"an NVIDIA GPU is here, but its driver does not answer ({error})"
        is_here = any(path.exists() for path in DEVICE_FILES)
        return f"{problem}: see nvidia-smi, then reboot" if is_here else None
    version = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    problem = f"{version} cannot use the NVIDIA GPU here, with driver {driver}: see nvidia-smi"
    return f'{problem}, then reboot, or README.md, "An older driver"' if count else None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that matmuls run in; see `model.dtype` in src/config.py."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    # including_emulation=False: older GPUs emulate bf16, slower than fp32.
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype`; nothing for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
