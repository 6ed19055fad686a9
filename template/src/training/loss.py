"""Cross entropy of the labelled tokens, summed; with a plain head, computed in chunks.

Logits are the largest tensor of a fine-tuning step: 16,384 tokens x a vocabulary of 128,256 x 4
bytes is 7.8 GiB, and as much again for the gradient. Prompts and filler carry no loss, so only
labelled positions go through the head, a chunk at a time.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.data import IGNORE
from src.data.batching import MODEL_INPUTS
from src.models.adapters import base_of, stop_input_casts
from src.models.head import PlainHead
from src.utils.device import autocast


def chunk_loss_and_grad(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of a chunk, and its gradient with respect to the logits.

    Args:
        logits: of shape (rows, vocabulary).
        target: of shape (rows,), -100 where positions were padded to a multiple of 128.
    """
    dtype, logits = logits.dtype, logits.float()  # the name is reused, so the first is freed
    loss = _cross_entropy(logits, target)
    grad, token = logits.softmax(-1), target.clamp(min=0)[:, None]
    # grad becomes softmax - one_hot
    if torch.compiler.is_compiling():  # comparing instead of scattering gives one fused kernel
        grad = grad - (torch.arange(grad.shape[1], device=grad.device) == token).float()
    else:
        grad.scatter_add_(1, token, -torch.ones_like(token, dtype=grad.dtype))
    grad *= (target != IGNORE)[:, None]
    return loss, grad.to(dtype)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")


class Objective(nn.Module):
    """A model with its summed loss as forward pass, which DDP and FSDP can wrap.

    Args:
        model: a causal language model, with or without adapters.
        dtype: of matmuls, by autocast.
        head: from `find_plain_head`; None: all logits are computed by the model.

    With a plain head the loss calls the backbone and not the model's forward pass: hooks of DDP or
    FSDP around the model would not run. So they wrap this class.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, head: PlainHead | None = None) -> None:
        super().__init__()
        stop_input_casts(model)
        self.model: Any = model
        self.dtype, self.head = dtype, head

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """As `summed_loss`."""
        for name in {"cu_seq_lens_q", "cu_seq_lens_k"} & batch.keys():
            # The number of documents in a row varies: compile once for any number.
            torch._dynamo.maybe_mark_dynamic(batch[name], 0)
        with autocast(batch["input_ids"].device, self.dtype):
            return summed_loss(self.model, batch, self.head)

    def call(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Run `work(model, …)`: see `src.training.strategy.run_on_model`."""
        return work(self.model, *arguments, **options)


def summed_loss(model: nn.Module, batch: dict[str, Any], head: PlainHead | None) -> Tensor:
    """The cross entropy of all labelled tokens of a batch, summed, as an fp32 scalar.

    Args:
        model: a causal language model.
        batch: what `src.data.batching` makes, on the model's device.
        head: from `find_plain_head`; None computes all logits, which every model can.
    """
    inputs = {k: batch[k] for k in MODEL_INPUTS if k in batch}
    positions, targets = batch["positions"], batch["targets"]
    if head is None:
        return _cross_entropy(_logits_at(model, inputs, positions), targets)
    hidden = head.backbone(**inputs, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[positions]  # (labels, hidden)
    weight = head.linear.weight
    if not torch.is_grad_enabled():  # requires_grad is still True: skip its gradient
        weight = weight.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, head)


def _logits_at(model: nn.Module, inputs: dict[str, Any], positions: Tensor) -> Tensor:
    """Logits of shape (labels, vocabulary); of one row, no others are computed if the model can."""
    one_row = inputs["input_ids"].shape[0] == 1  # logits_to_keep is one set for all rows
    if one_row and "logits_to_keep" in inspect.signature(base_of(model).forward).parameters:
        return model(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    return model(**inputs, use_cache=False).logits.flatten(0, 1)[positions]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum(cross_entropy(hidden @ weight.T, targets)), a chunk of rows at a time.

    The gradient is (softmax - one_hot) @ weight: known as soon as a chunk's logits are, so the
    forward pass computes it and drops the logits (the idea of Liger's fused head, Hsu et al.
    2024, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: PlainHead
    ) -> Tensor:
        grad_hidden = torch.zeros_like(hidden) if hidden.requires_grad else None
        grad_weight = None
        if weight.requires_grad:  # it sums over all chunks, so in fp32: bf16 would round each sum
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        loss_and_grad = head.loss_and_grad or chunk_loss_and_grad
        for start in range(0, len(hidden), head.chunk):
            rows = slice(start, start + head.chunk)
            h, target = hidden[rows], targets[rows]
            if grad_hidden is None and grad_weight is None:
                total += _cross_entropy(F.linear(h, weight), target)
                continue
            loss, grad = loss_and_grad(F.linear(h, weight), target)  # (chunk, vocabulary)
            total += loss
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight  # autocast caches no cast of a view (weight.T)
            if grad_weight is not None:
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_outputs[0]
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_outputs[0]).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None
