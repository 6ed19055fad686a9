"""Cross entropy of the labelled tokens, summed, without ever holding all logits at once.

Logits are the largest tensor of a fine-tuning step: 16,384 tokens x 128,256 words x 4 bytes is
7.8 GiB, and as much again for the gradient. Prompts and filler carry no loss, so only labelled
positions go through the head, a chunk at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from src.data import IGNORE

CHUNK = 1024  # rows of logits at a time: 0.5 GiB in fp32 with a vocabulary of 128k
CPU_CHUNK = 128  # which a CPU's cache holds: a fifth more tokens a second
# What a batch may hold for the model; the rest of it is for the loop.
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


def label_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the model predicts a labelled token, and which.

    Call it before the labels go to the GPU: the result's length depends on their values, and
    there it would wait for the device.

    Args:
        labels: shape (rows, length), aligned with input_ids; -100 carries no loss.

    Returns:
        Positions in the flattened (rows x length) batch, and targets, both of one length: the
        number of labels, padded with target -100 to a multiple of 128, so that few shapes occur.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # the next token's label
    positions = (shifted != IGNORE).nonzero().squeeze(1)
    missing = -len(positions) % 128
    return F.pad(positions, (0, missing)), F.pad(shifted[positions], (0, missing), value=IGNORE)


def summed_loss(model: nn.Module, batch: dict[str, Any], head: PlainHead | None) -> torch.Tensor:
    """The cross entropy of all labelled tokens of a batch, summed, as an fp32 scalar.

    Args:
        model: a causal language model.
        batch: model inputs, and `positions` and `targets` of `label_positions`, on its device.
        head: from `find_plain_head`; None computes all logits, which every model can.
    """
    inputs = {k: batch[k] for k in MODEL_INPUTS if k in batch}
    positions, targets = batch["positions"], batch["targets"]
    if head is None:
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)  # (tokens, vocabulary)
        return F.cross_entropy(logits[positions].float(), targets, reduction="sum")
    hidden = head.backbone(**inputs, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[positions]  # (labels, hidden)
    return _ChunkedCrossEntropy.apply(hidden, head.linear.weight, head.linear.bias, targets)


class PlainHead:
    """A model whose logits are one linear layer on its backbone's last hidden state."""

    def __init__(self, backbone: nn.Module, linear: nn.Linear) -> None:
        self.backbone, self.linear = backbone, linear


@torch.no_grad()
def find_plain_head(model: nn.Module) -> PlainHead | None:
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
    device = head.weight.device
    bounds = torch.tensor([0, 8], dtype=torch.int32, device=device)
    inputs = {
        "input_ids": torch.arange(8, device=device)[None] % head.out_features,
        "position_ids": torch.arange(8, device=device)[None],
        "use_cache": False,
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 8, "max_length_k": 8},
    }
    training = base.training
    base.eval()
    hidden = backbone(**inputs).last_hidden_state
    logits = base(**inputs).logits.float()
    same = torch.allclose(logits, head(hidden).float(), rtol=1e-2, atol=1e-2)
    base.train(training)
    return PlainHead(backbone, head) if same else None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum(cross_entropy(hidden @ weight.T + bias, targets)), a chunk of rows at a time.

    The gradient is (softmax - one_hot) @ weight: known as soon as a chunk's logits are, so the
    forward pass computes it and drops the logits (the idea of Liger's fused head, Hsu et al.
    2024, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = grad_weight = grad_bias = None
        if hidden.requires_grad:
            grad_hidden = torch.empty_like(hidden)
        # fp32: thousands of rows are added up, which bf16 would round at each step.
        if weight.requires_grad:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        if bias is not None and bias.requires_grad:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        chunk = CPU_CHUNK if hidden.device.type == "cpu" else CHUNK
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h, target = hidden[rows], targets[rows]
            logits = F.linear(h, weight, bias).float()  # (chunk, vocabulary)
            total += F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            delta = logits.softmax(-1)  # d loss / d logits = softmax - one_hot
            real = target != IGNORE
            delta.scatter_add_(1, target.clamp(min=0)[:, None], -real.to(delta.dtype)[:, None])
            delta *= real[:, None]
            if grad_hidden is not None:
                grad_hidden[rows] = F.linear(delta.to(h.dtype), weight.T).to(h.dtype)
            if grad_weight is not None:
                grad_weight += F.linear(delta.T.to(h.dtype), h.T).float()
            if grad_bias is not None:
                grad_bias += delta.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *upstreams: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (upstream,) = upstreams
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else grad_hidden * upstream.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * upstream).to(weight_dtype),
            None if grad_bias is None else (grad_bias * upstream).to(bias_dtype),
            None,
        )
