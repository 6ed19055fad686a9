"""The optimizer and the course of its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from src.config import TrainingConfig


def make_optimizer(model: nn.Module, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW on the trainable parameters; weight decay on matrices only.

    Norms and biases are scales and offsets: pulling them to zero does not regularise.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(groups, lr=settings.learning_rate)
    # fused: one kernel for all parameters, and it can skip a step without asking the CPU.
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainingConfig, total_steps: int
) -> LambdaLR:
    """Linear warm-up, then constant, or down to zero in a line or half a cosine."""
    warmup = settings.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup  # the first step learns something too
        done = (step - warmup) / max(1, total_steps - warmup)
        if settings.scheduler == "linear":
            return max(0.0, 1 - done)
        if settings.scheduler == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return 1.0

    return LambdaLR(optimizer, factor)
