"""How several processes share a model: each has a copy (DDP) or a shard (FSDP2).

Either way gradients are summed over processes and not averaged, because the loss is already
divided by the labels of all of them. With one process the model is not wrapped.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
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
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.models.attention import set_attention
from src.models.head import find_plain_head
from src.models.model import build_model, decoder_layers
from src.training.loss import Objective
from src.training.optimizer import dtype_of_trained
from src.utils.errors import UserError
from src.utils.ranks import RANK, WORLD_SIZE


def build_objective(
    config: Config, tokenizer: Tokenizer, shards: int, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, bool]:
    """Build the model with its loss, attention and head, shared among the processes.

    Returns:
        The `Objective`, in DDP or in so many shards, and whether rows are packed.
    """
    build = partial(
        build_model, config.model, config.lora, tokenizer,
        dtype=dtype, trained_in=dtype_of_trained(config.training, dtype),
    )  # fmt: skip
    objective = distribute(build, shards, device, dtype)
    attention = config.model.attention
    packing = run_on_model(objective, set_attention, attention, config.data.packing, dtype)
    unwrapped(objective).head = run_on_model(objective, find_plain_head, dtype)
    return objective, packing


def distribute(
    build: Callable[[torch.device], PreTrainedModel],
    shards: int,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Build the model in its `Objective`, and share it among the processes.

    For shards only the main process builds the whole model, in host memory. The others build it
    on the device `meta` and receive their shards one tensor at a time, so memory does not grow
    with the number of ranks.
    """
    if shards == 1:
        objective = Objective(build(device), dtype)
        return _replicate(objective) if WORLD_SIZE > 1 else objective
    with torch.random.fork_rng([]):  # PEFT draws random numbers on `meta` too
        objective = Objective(build(torch.device("meta")), dtype)
    _shard(objective, shards, device, dtype)
    objective.to_empty(device=device)
    _fill(objective.model, build(torch.device("cpu")) if RANK == 0 else None, device)
    return objective


def _replicate(module: nn.Module) -> nn.Module:
    """DDP: gradients are summed in buckets during the backward pass."""
    replica = DistributedDataParallel(module, gradient_as_bucket_view=True)
    replica.broadcast_buffers = False  # not in each forward pass: they are the same
    replica.register_comm_hook(None, _sum_bucket)
    return replica


def _sum_bucket(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _shard(objective: Objective, shards: int, device: torch.device, dtype: torch.dtype) -> None:
    """FSDP2 over a mesh of copies and shards: a layer is whole only while it computes."""
    layers = decoder_layers(objective.model)
    if not layers:
        raise UserError("training.strategy: this architecture does not name its layers; use ddp")
    axes = {"copies": WORLD_SIZE // shards, "shards": shards}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    half = None if dtype == torch.float32 else dtype
    # Weights are gathered in half precision, as autocast casts them; gradients summed in fp32.
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for module in (*layers, objective):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
    register_fsdp_forward_method(objective, "call")


@torch.no_grad()
def _fill(model: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """Give each process its shard of the main process's weights, and all buffers.

    Non-persistent buffers too: rotary frequencies built on `meta` would be garbage, silently.
    """
    source = dict(chain(whole.named_parameters(), whole.named_buffers())) if whole else {}
    for name, target in chain(model.named_parameters(), model.named_buffers()):
        value = source[name].detach() if source else torch.empty(target.shape)
        value = value.to(device, target.dtype)
        if isinstance(target, DTensor):
            target.copy_(distribute_tensor(value, target.device_mesh, target.placements))
        else:
            dist.broadcast(value, 0)
            target.copy_(value)


def unwrapped(objective: nn.Module) -> Any:
    """The `Objective` itself, without DDP around it."""
    return objective.module if isinstance(objective, DistributedDataParallel) else objective


def run_on_model(objective: nn.Module, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run `work(model, …)`, which runs the model, with FSDP's root parameters gathered."""
    objective = unwrapped(objective)
    result = objective.call(work, *args, **options)
    reshard(objective)
    return result


def reshard(objective: nn.Module) -> None:
    """Shard FSDP's root parameters again, after forward passes without a backward pass.

    FSDP keeps them gathered for the backward pass, and an optimizer must not see them like that.
    """
    if isinstance(objective, FSDPModule):
        objective.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors to save; sharded ones are gathered in the main process's host memory."""
    once = dict(model.named_parameters()) | dict(model.named_buffers())  # tied weights are one
    if not any(isinstance(tensor, DTensor) for tensor in once.values()):
        return model.state_dict()
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=hasattr(model, "peft_config")
    )
    saved: dict[str, Any] = get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in saved.items() if name in once}
