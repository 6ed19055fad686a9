"""Seeding of every random number generator that training touches."""

import random

import numpy as np
import torch


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed python, numpy, torch and every CUDA device.

    Args:
        seed: any integer from 0 to 2**32 - 1 (numpy's range).
        deterministic: also make torch refuse operations that have no deterministic kernel.
            cuDNN's flag alone leaves scatter, index_add and cuBLAS free to vary. It costs
            speed; a run on the same machine and versions then repeats bit for bit. On a GPU
            CUBLAS_WORKSPACE_CONFIG must be set before CUDA starts, as scripts/train.py does; torch
            raises at the first matrix product where it is not set.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries draw from the legacy global generator
    torch.manual_seed(seed)  # the CPU's and every CUDA device's generator
    if not deterministic:
        return
    torch.use_deterministic_algorithms(True)
    # use_deterministic_algorithms fills every torch.empty with NaN by default: slow, and only
    # useful to find reads of uninitialised memory.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
