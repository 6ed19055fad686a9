"""The optimizer, and the schedule of its learning rate."""

import math
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from src.config import TrainingConfig

MOMENTS = {"adamw": 8, "adamw8bit": 2}  # bytes a weight, for both


def dtype_of_trained(settings: TrainingConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights in full fine-tuning: bf16 if updates are rounded stochastically.

    Rounding to nearest, a bf16 weight of 0.02 loses every update below 3e-5, which is most of
    them. Stochastic rounding keeps them on average (Zamirai et al. 2020, arXiv:2010.06192).
    """
    stochastic = settings.optimizer == "adamw8bit" and dtype == torch.bfloat16
    return torch.bfloat16 if stochastic else torch.float32


def make_optimizer(model: nn.Module, settings: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW on the trainable parameters; weight decay on matrices only.

    Norms and biases are scales and offsets: decaying them to zero does not regularise.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(groups, lr=settings.learning_rate, bf16_stochastic_round=True)
    # fused: one kernel for all parameters, and it can skip a step without asking the CPU.
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: TrainingConfig, total_steps: int, done: int = 0
) -> LambdaLR:
    """Linear warm-up, then a constant rate, or linear or cosine decay to zero.

    It has no state: the rate follows from the configuration and the number of steps `done`.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # LambdaLR requires it if it does not start at step 0
    return LambdaLR(optimizer, partial(rate_factor, settings, total_steps), last_epoch=done - 1)


def rate_factor(settings: TrainingConfig, total_steps: int, step: int) -> float:
    """The factor of `training.learning_rate` at a step, counted from 0."""
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / warmup  # not 0 at the first step
    progress = (step - warmup) / max(1, total_steps - warmup)
    if settings.scheduler == "linear":
        return max(0.0, 1 - progress)
    if settings.scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return 1.0


def count_steps(settings: TrainingConfig, batches: int) -> int:
    """Optimizer steps of a whole run, given the batches of an epoch on each process."""
    steps = -(-batches // settings.gradient_accumulation_steps) * settings.epochs
    return min(steps, settings.max_steps or steps)
