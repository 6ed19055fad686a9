"""The training loop: an epoch of steps, one step in full, and the loss on an evaluation set."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import batched
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from src.data.batching import to_device, with_targets
from src.models.head import find_plain_head
from src.training import strategy
from src.training.loss import Objective
from src.utils import distributed
from src.utils.device import autocast
from src.utils.errors import RunError


@dataclass
class StepResult:
    """One optimizer step. Tensors stay on the device: reading one waits for the GPU."""

    loss: Tensor  # fp32 scalar: mean over the labelled tokens of all microbatches and ranks
    grad_norm: Tensor  # before clipping
    # bool: loss and gradients are finite (fp16: the loss only). Unless `skip_non_finite` is set,
    # also False after an earlier non-finite step of the same epoch.
    finite: Tensor
    labelled: int  # tokens with loss, all ranks
    tokens: int  # real tokens, all ranks
    microbatches: int  # of this rank
    documents: list[int]  # dataset indices in this rank's microbatches, for error messages
    learning_rate: float
    waited: float = 0.0  # seconds spent waiting for data

    @property
    def taken(self) -> bool:
        """Whether weights were updated. A skip by an fp16 scaler is not seen. Waits for the GPU."""
        return bool(self.finite) and self.labelled > 0


def on_cpu(steps: list[StepResult]) -> list[StepResult]:
    """The same steps with their tensors on the CPU.

    Copying them waits for the device. With fused AdamW in bf16 or fp32 nothing else in a training
    step does; adamw8bit and fp16 also wait once a step.
    """
    rows = torch.stack([torch.stack([s.loss, s.grad_norm, s.finite]) for s in steps]).cpu()
    return [
        replace(step, loss=loss, grad_norm=norm, finite=finite > 0)
        for step, (loss, norm, finite) in zip(steps, rows, strict=True)
    ]


def train_epoch(
    model: nn.Module, loader: Iterable[dict[str, Any]], optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None, device: torch.device | str, **options: Any,
) -> float:  # fmt: skip
    """Train on every batch of a loader once; return the mean loss of a labelled token.

    Arguments and options are those of `training_steps`, which `src/training/run.py` uses too.

    Raises:
        RunError: a loss or gradient was not finite, and `skip_non_finite` is not set.
    """
    total, labelled, finite = torch.zeros((), device=device), 0, True
    for step in training_steps(model, loader, optimizer, scaler, device, **options):
        finite = step.finite
        total += torch.where(finite, step.loss * step.labelled, 0)
        labelled += finite * step.labelled
    if not finite and not options.get("skip_non_finite"):
        raise RunError("a loss or gradient was not finite; no step was taken from there on")
    return float(total / max(labelled, 1))


def training_steps(
    model: nn.Module, loader: Iterable[dict[str, Any]], optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None, device: torch.device | str, *, accumulation: int = 1,
    max_grad_norm: float | None = 1.0, dtype: torch.dtype = torch.bfloat16,
    skip_non_finite: bool = False,
) -> Iterator[StepResult]:  # fmt: skip
    """Take the optimizer steps of an epoch, lazily: each `next()` takes one.

    Args:
        model: a causal language model, or its `Objective`; it is put into training mode.
        loader: dicts with `input_ids` and `labels`, shape (rows, length), -100 where there is no
            loss; optionally `position_ids`, `cu_seq_lens_*` or an `attention_mask`.
        optimizer: steps on the model's trainable parameters.
        scaler: needed for fp16 only; None, or a disabled one, for bf16 and fp32.
        device: where the batches go.
        accumulation: batches per step; the last step of an epoch may have fewer.
        max_grad_norm: gradients above this norm are scaled down to it; None: never.
        dtype: to autocast to; ignored for an `Objective`, which has its own.
        skip_non_finite: go on after a step whose loss or gradient is not finite, without taking
            it. False: after the first such step no weights change until the epoch ends. So the
            caller can check `StepResult.finite` at log time, without waiting at each step.
    """
    device, finite = torch.device(device), None
    objective = as_objective(model, dtype).train()
    ready = time.perf_counter()
    for batches in batched(loader, accumulation):
        waited = time.perf_counter() - ready
        step = train_step(
            objective, batches, optimizer, scaler, device, max_grad_norm=max_grad_norm,
            earlier_finite=None if skip_non_finite else finite,
        )  # fmt: skip
        finite, step.waited = step.finite, waited
        yield step
        ready = time.perf_counter()


def as_objective(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Wrap the model in an `Objective`, unless it is one already, also within DDP."""
    ready = isinstance(strategy.unwrapped(model), Objective)
    return model if ready else Objective(model, dtype, find_plain_head(model, dtype))


def train_step(
    objective: nn.Module, batches: Iterable[dict[str, Any]], optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None, device: torch.device, *, max_grad_norm: float | None,
    earlier_finite: Tensor | None = None,
) -> StepResult:  # fmt: skip
    """One step: count labels → forward and backward of each microbatch → check → update.

    `earlier_finite`: False: this step changes no weights. None: earlier steps do not count.

    The divisor is the number of labels in all microbatches on all ranks, known before the
    first backward pass. Averaging the microbatches' means instead gives tokens in sparsely
    labelled microbatches too much weight (transformers#34191).
    """
    batches = [with_targets(batch) for batch in batches]
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    labelled = int(distributed.all_sum(sum(b["labelled"] for b in batches)))
    loss = torch.zeros((), device=device)
    for number, batch in enumerate(batches, 1):
        # DDP sums gradients over processes at the last microbatch only. FSDP ignores this and sums
        # at each one; otherwise every process would hold unsharded gradients.
        vars(objective)["require_backward_grad_sync"] = number == len(batches)
        share = objective(to_device(batch, device)) / max(labelled, 1)
        scaler.scale(share).backward()
        loss += share.detach()
    distributed.sum_tensor(loss)
    if labelled:  # unscale_ may run once per scaler.update(), which is skipped without labels
        scaler.unscale_(optimizer)
    # Without a limit the norm is measured only. The CPU does not wait for it.
    norm = nn.utils.clip_grad_norm_(objective.parameters(), max_grad_norm or math.inf)
    norm, finite = strategy.full_tensor(norm), torch.isfinite(loss)
    if not scaler.is_enabled():  # fp16 gradients may overflow; then the scaler skips the step
        finite = finite & torch.isfinite(norm)
    if earlier_finite is not None:
        finite = finite & earlier_finite
    if labelled:
        _step_if_finite(optimizer, scaler, finite)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss, norm, finite, labelled,
        tokens=int(distributed.all_sum(sum(b["tokens"] for b in batches))),
        microbatches=len(batches), documents=[row for b in batches for row in b.get("rows", [])],
        learning_rate=float(optimizer.param_groups[0]["lr"]),
    )  # fmt: skip


def _step_if_finite(optimizer: Optimizer, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """Take the step if `finite`; the CPU waits for the GPU only where it must."""
    # adamw8bit calls torch.compile. A machine without a GPU may lack a compiler: run eagerly there.
    # On a GPU keep the stance, which is eager if compiling the layers failed.
    with nullcontext() if finite.is_cuda else torch.compiler.set_stance("force_eager"):
        if scaler.is_enabled():
            if finite:  # the loss is; scaler.step looks at the gradients
                scaler.step(optimizer)
            scaler.update()  # halves the scale after an overflow
        elif optimizer.defaults.get("fused"):
            # If found_inf is 1, the kernel changes neither weights nor moments. It reads the flag
            # on the device: no synchronisation. GradScaler uses the same attributes.
            vars(optimizer).update(found_inf=(~finite).float(), grad_scale=None)
            optimizer.step()
        elif finite:
            optimizer.step()


@torch.no_grad()  # under inference_mode a model would cache tensors that training cannot use later
def evaluate(
    model: nn.Module, loader: Iterable[dict[str, Any]], device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
) -> float:  # fmt: skip
    """Mean loss per labelled token, in nats; train or eval mode is restored.

    Sums, not means of means. No logits are kept, so evaluation fits wherever training does.
    """
    device, training = torch.device(device), model.training
    total, labelled = torch.zeros((), device=device), 0
    model.eval()
    objective = strategy.unwrapped(as_objective(model, dtype))
    with autocast(device, objective.dtype):  # around all batches: weights are cast once
        for batch in map(with_targets, loader):
            total += objective(to_device(batch, device))
            labelled += batch["labelled"]
    strategy.reshard(objective)
    model.train(training)
    distributed.sum_tensor(total)
    labelled = distributed.all_sum(labelled)
    return total.item() / max(labelled, 1)


def perplexity(loss: float) -> float:
    """The exponential of a loss."""
    return math.exp(min(loss, 700.0))  # of a larger one there is no float
