"""One process or many: the few collective operations that training needs.

`torchrun --nproc-per-node=8 scripts/train.py` sets RANK, LOCAL_RANK and WORLD_SIZE; without
them every function here does nothing, at no cost.
"""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process prints, logs and saves."""
    return RANK == 0


def own_device(device: torch.device) -> torch.device:
    """This process's GPU of those on its machine."""
    return torch.device("cuda", LOCAL_RANK) if device.type == "cuda" else device


@contextmanager
def process_group(device: torch.device) -> Generator[None]:
    """Join the other processes, if there are any."""
    if WORLD_SIZE == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    # gloo beside NCCL: counts and flags are summed on the CPU, without waiting for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_sum(value: float) -> float:
    """The sum of a plain number over all processes."""
    if WORLD_SIZE == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def barrier() -> None:
    """Wait until all processes are here."""
    all_sum(0)


def on_main(work: Callable[..., object], *arguments: object) -> None:
    """Let the main process do it, while the others wait."""
    if is_main():
        work(*arguments)
    barrier()


def sum_gradients(model: nn.Module) -> None:
    """Add up the gradients of all processes; the loss was divided by all their labels already.

    One flat tensor per dtype: for adapters that is a single collective of some 100 MB.
    """
    if WORLD_SIZE == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if p.grad is None:  # a rank whose batch was all filler
            p.grad = torch.zeros_like(p)
    for dtype in dict.fromkeys(p.dtype for p in trained):  # in one order on all ranks
        grads = [p.grad for p in trained if p.grad is not None and p.dtype == dtype]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for grad, piece in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(piece.view_as(grad))


def sum_tensor(value: torch.Tensor) -> torch.Tensor:
    """The sum of a device tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(value)
    return value
