"""One process or many: the few collective operations that training needs.

`torchrun --nproc-per-node=8 scripts/train.py` sets RANK, LOCAL_RANK and WORLD_SIZE; without
them every function here does nothing, at no cost.
"""

import inspect
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from src.utils.ranks import LOCAL_RANK, RANK, RESTARTS, WORLD_SIZE


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
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Under its own prefix: the store outlives a restart, and with it the addresses of the dead.
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(str(RESTARTS), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    yield
    # Not after an error: the others may be gone, and NCCL would wait for them.
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


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if WORLD_SIZE == 1:
        return [value]
    found: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(found, value)
    return found


def replicate(module: nn.Module) -> nn.Module:
    """Let DDP add up the gradients of all processes, in buckets, while the backward pass goes on.

    It begins with the main process's weights on all. Its own averaging is replaced by a sum: the
    loss is divided by the labels of all processes already.
    """
    if WORLD_SIZE == 1:
        return module
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers"  # of which torch before 2.15 knows an older name only
    buffers: Any = {name if name in parameters else "broadcast_buffers": False}
    replica = DistributedDataParallel(module, gradient_as_bucket_view=True, **buffers)
    replica.register_comm_hook(None, _sum_bucket)
    return replica


def _sum_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def syncing(module: nn.Module, now: bool) -> AbstractContextManager:
    """Around a forward and backward pass: whether gradients are added up in it, or kept for later.

    Once a step is enough, with its last microbatch.
    """
    if now or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def unwrapped(module: nn.Module) -> Any:
    """What `replicate` was given."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def sum_tensor(value: torch.Tensor) -> torch.Tensor:
    """The sum of a device tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(value)
    return value
