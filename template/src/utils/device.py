"""Which device and dtype a run computes with, and autocast to it."""

from contextlib import AbstractContextManager, nullcontext

import torch

from src.utils.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one; `cuda` without one is an error, not a slow surprise."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        reason = (
            f"no GPU, or a driver too old for CUDA {torch.version.cuda}: see nvidia-smi"
            if torch.version.cuda
            else "this torch was built without CUDA"
        )
        raise UserError(f"device: cuda is not available ({reason}); use device=auto or device=cpu")
    return torch.device("cuda" if available and wanted != "cpu" else "cpu")


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
