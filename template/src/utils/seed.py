"""Seeding of every random number generator that training touches."""

import os
import random

import numpy as np
import torch


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed python, numpy, torch and every CUDA device.

    Args:
        seed: any integer from 0 to 2**32 - 1 (numpy's range).
        deterministic: also make torch refuse operations that have no deterministic kernel.
            cuDNN's flag alone leaves scatter, index_add and cuBLAS free to vary. It costs
            speed; a run on the same machine and versions then repeats bit for bit.

    Raises:
        RuntimeError: `deterministic` was asked for after CUDA had started without
            CUBLAS_WORKSPACE_CONFIG, which cuBLAS reads once, when its first handle is made.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from the legacy global generator
    torch.manual_seed(seed)  # the CPU's and every CUDA device's generator
    if not deterministic:
        return
    if torch.cuda.is_initialized() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        raise RuntimeError(
            "deterministic=True came after CUDA had started: call set_seed first, "
            "or start the process with CUBLAS_WORKSPACE_CONFIG=:4096:8"
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # use_deterministic_algorithms fills every torch.empty with NaN by default: slow, and only
    # useful to find reads of uninitialised memory.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
