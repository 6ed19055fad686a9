"""Cross entropy of the labelled tokens, summed, without ever holding all logits at once.

Logits are the largest tensor of a fine-tuning step: 16,384 tokens x 128,256 words x 4 bytes is
7.8 GiB, and as much again for the gradient. Prompts and filler carry no loss, so only labelled
positions go through the head, a chunk at a time.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.data import IGNORE
from src.data.batching import MODEL_INPUTS, collate_packed, to_device
from src.data.dataset import Document
from src.utils.device import autocast

CHUNK = 1024  # rows of logits at a time: 0.5 GiB in fp32 with a vocabulary of 128k
CPU_CHUNK = 128  # which a CPU's cache holds: a fifth more tokens a second


class PlainHead(NamedTuple):
    """A model whose logits are one linear layer on its backbone's last hidden state."""

    backbone: nn.Module
    linear: nn.Linear


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
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)  # (tokens, vocabulary)
        return F.cross_entropy(logits[positions].float(), targets, reduction="sum")
    hidden = head.backbone(**inputs, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[positions]  # (labels, hidden)
    weight, bias = head.linear.weight, head.linear.bias
    if not torch.is_grad_enabled():  # weights that train would be given a gradient all the same
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets)


@torch.no_grad()
def find_plain_head(model: nn.Module, device: torch.device, dtype: torch.dtype) -> PlainHead | None:
    """The model's backbone and head, if the head is nothing but a linear layer.

    Some models scale or cap their logits (Gemma 2, Granite, Cohere) or adapt the head. Rather
    than know them by name, compare both ways on eight tokens.
    """
    base: Any = model
    if hasattr(model, "peft_config"):
        base = base.get_base_model()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    backbone = getattr(base, "base_model", base)
    if type(head) is not nn.Linear or backbone is base:
        return None
    ids = np.arange(8) % head.out_features
    batch = collate_packed([Document(0, ids, ids)], budget=8, max_length=8, pad_id=0)
    inputs = to_device(batch, device, MODEL_INPUTS)
    training = base.training
    base.eval()
    # Eagerly: else eight tokens would be the first shape that a compiled layer sees.
    with torch.compiler.set_stance("force_eager"), autocast(device, dtype):
        logits = base(**inputs, use_cache=False).logits.float()
        plain = head(backbone(**inputs, use_cache=False).last_hidden_state).float()
    base.train(training)
    same = bool((plain - logits).norm() <= 0.01 * logits.norm())  # both 0, from a head of zeros
    return PlainHead(backbone, head) if same else None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum(cross_entropy(hidden @ weight.T + bias, targets)), a chunk of rows at a time.

    The gradient is (softmax - one_hot) @ weight: known as soon as a chunk's logits are, so the
    forward pass computes it and drops the logits (the idea of Liger's fused head, Hsu et al.
    2024, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        # fp32: thousands of rows are added up, which bf16 would round at each step.
        dtypes = (hidden.dtype, torch.float32, torch.float32)
        grads = [
            torch.zeros_like(x, dtype=dtype) if x is not None and x.requires_grad else None
            for x, dtype in zip((hidden, weight, bias), dtypes, strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else CHUNK
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h, target = hidden[rows], targets[rows]
            logits = F.linear(h, weight, bias).float()  # (chunk, vocabulary)
            total += F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
            if all(grad is None for grad in grads):
                continue
            delta = logits.softmax(-1)  # d loss / d logits = softmax - one_hot
            real = target != IGNORE  # not so where positions were padded to a round number
            delta.scatter_add_(1, target.clamp(min=0)[:, None], -real.to(delta.dtype)[:, None])
            delta *= real[:, None]
            if grad_hidden is not None:
                grad_hidden[rows] = F.linear(delta.to(h.dtype), weight.T)
            if grad_weight is not None:
                grad_weight += F.linear(delta.T.to(h.dtype), h.T)
            if grad_bias is not None:
                grad_bias += delta.sum(0)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if g is None else (g * upstreams[0]).to(dtype) for g, dtype in grads), None
