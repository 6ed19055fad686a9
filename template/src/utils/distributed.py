"""One process or many: the few collective operations that training needs.

`torchrun --nproc-per-node=8 scripts/train.py` sets RANK, LOCAL_RANK and WORLD_SIZE; without
them every function here does nothing, at no cost.
"""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from src.utils.errors import RunError
from src.utils.ranks import LOCAL_RANK, RANK, RESTARTS, WORLD_SIZE


def is_main() -> bool:
    """Whether this process prints, logs and saves."""
    return RANK == 0


@contextmanager
def process_group(device: torch.device, timeout: int) -> Generator[None]:
    """Join the other processes, if there are any.

    Args:
        device: what they compute on.
        timeout: seconds to wait for one that hangs.

    Raises:
        RunError: a process did not answer in time; the message names it.
    """
    if WORLD_SIZE == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    # gloo beside NCCL: counts and flags are summed on the CPU, without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The store survives restarts; a new prefix hides stale rank addresses.
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(str(RESTARTS), store)
    limit = timedelta(seconds=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield
    except RuntimeError as error:
        # gloo says it in another way where DDP's sum of gradients waits
        late = any(words in str(error) for words in ("imed out", "Application timeout"))
        if not late or not (hung := _ranks_that_hang(store)):
            raise
        names = ", ".join(map(str, hung))
        problem = f"training.timeout: rank {names} did not answer within {timeout} s"
        raise RunError(f"{problem}; the newest checkpoint is whole") from error
    # Not after an error: the others may be gone, and NCCL would wait for them.
    dist.destroy_process_group()


def _ranks_that_hang(store: dist.Store) -> list[int]:
    """The ranks that do not report the timeout within five seconds."""
    store.set(f"noticed/{RANK}", "")
    time.sleep(5)
    return [rank for rank in range(WORLD_SIZE) if not store.check([f"noticed/{rank}"])]


def all_sum(value: float) -> float:
    """The sum of a plain number over all processes."""
    return sum_tensor(torch.tensor(value, dtype=torch.float64)).item()


def on_main(work: Callable[..., Any], *arguments: object) -> Any:
    """Run `work` on the main process, while the others wait; return its result on all."""
    return gather(work(*arguments) if is_main() else None)[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if WORLD_SIZE == 1:
        return [value]
    values: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def sum_tensor(value: torch.Tensor) -> torch.Tensor:
    """The sum of a device tensor over all processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(value)
    return value
