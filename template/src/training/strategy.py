"""How several processes share a model: each has all of it (DDP), or each a shard (FSDP2).

Either way the gradients of all processes are added up and never averaged: the loss is divided by
the labels of all of them already. With one process every function here does nothing.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from src.models.model import decoder_layers
from src.training.loss import Objective
from src.utils.errors import UserError
from src.utils.ranks import LOCAL_WORLD_SIZE, RANK, WORLD_SIZE


def shards(strategy: str) -> int:
    """Into how many shards a model is divided."""
    return {"fsdp": WORLD_SIZE, "hsdp": LOCAL_WORLD_SIZE}.get(strategy, 1)


def distribute(
    build: Callable[[torch.device], PreTrainedModel],
    strategy: str,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Build the model for its `Objective`, shared among the processes as the strategy says.

    Sharded, it is built whole by the main process alone, in the host's memory; the others know
    its shapes and receive their shards one tensor at a time. So memory does not grow with ranks.
    """
    if shards(strategy) == 1:
        objective = Objective(build(device))
        return _replicate(objective) if strategy else objective
    with torch.random.fork_rng([]):  # PEFT draws random numbers all the same
        objective = Objective(build(torch.device("meta")))
    _shard(objective, shards(strategy), device, dtype)
    objective.to_empty(device=device)
    _fill(objective.model, build(torch.device("cpu")) if RANK == 0 else None, device)
    return objective


def _replicate(module: nn.Module) -> nn.Module:
    """DDP: gradients are added up in buckets while the backward pass goes on."""
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers"  # of which torch before 2.15 knows an older name only
    buffers: Any = {name if name in parameters else "broadcast_buffers": False}
    replica = DistributedDataParallel(module, gradient_as_bucket_view=True, **buffers)
    replica.register_comm_hook(None, _sum_bucket)
    return replica


def _sum_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _shard(objective: Objective, parts: int, device: torch.device, dtype: torch.dtype) -> None:
    """FSDP2 over a mesh of copies and shards: a layer is whole only while it computes."""
    layers = decoder_layers(objective.model)
    if not layers:
        raise UserError("training.strategy: this architecture does not name its layers; use ddp")
    axes = {"copies": WORLD_SIZE // parts, "shards": parts}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    half = None if dtype == torch.float32 else dtype
    # Gathered in half precision, as autocast would make of them; gradients are added up in fp32.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for module in (*layers, objective):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply on the way
    register_fsdp_forward_method(objective, "call")


@torch.no_grad()
def _fill(model: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Give each process its shard of the main process's weights, and all of its buffers.

    Buffers that are not saved too: made without data, rotary frequencies are garbage, silently.
    """
    source = dict(_named(whole)) if whole is not None else {}
    for name, target in _named(model):
        value = source[name].detach() if source else torch.empty(target.shape)
        value = value.to(device, target.dtype)
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
        else:
            dist.broadcast(value, 0)
            target.copy_(value)


def _named(model: nn.Module, remove_duplicate: bool = True) -> list[tuple[str, Tensor]]:
    parameters = model.named_parameters(remove_duplicate=remove_duplicate)
    return [*parameters, *model.named_buffers(remove_duplicate=remove_duplicate)]


def syncing(objective: nn.Module, now: bool) -> AbstractContextManager:
    """Around a forward and backward pass: whether gradients are added up in it, or kept for later.

    Once a step is enough, with its last microbatch; but not where each process has a shard, as
    whole gradients would be kept then.
    """
    if now or not isinstance(objective, DistributedDataParallel):
        return nullcontext()
    return objective.no_sync()


def unwrapped(objective: nn.Module) -> Any:
    """The `Objective` itself, without DDP around it."""
    return objective.module if isinstance(objective, DistributedDataParallel) else objective


def within(objective: nn.Module, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Do `work(model, …)`, which runs the model: with the weights that its root shares out."""
    objective = unwrapped(objective)
    result = objective.call(work, *arguments, **options)
    release(objective)
    return result


def release(objective: nn.Module) -> None:
    """Leave the root's weights sharded, after forward passes without a backward one.

    FSDP keeps them whole for it; an optimizer made or stepped then would see others.
    """
    if isinstance(objective, FSDPModule):
        objective.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is to be saved of a model; if it is sharded, in the main process's host memory alone."""
    saved = model.state_dict()
    if not any(isinstance(t, DTensor) for t in saved.values()):
        return saved
    adapted, found, known = hasattr(model, "peft_config"), {}, {}
    for name, tensor in _named(model, remove_duplicate=False):
        if name not in saved or (adapted and not tensor.requires_grad):
            continue
        if id(tensor) not in known:  # tied weights stay one
            whole = full(tensor.detach())
            known[id(tensor)] = whole.cpu() if RANK == 0 else whole.new_empty(0)
        found[name] = known[id(tensor)]
    return found
