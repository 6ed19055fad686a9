"""The training loop: one step whose body is the algorithm, an epoch of them, a whole run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch
from torch import nn

from src.data import IGNORE
from src.training import distributed
from src.training.loss import MODEL_INPUTS, PlainHead, find_plain_head, label_positions, summed_loss


class NonFinite(Exception):
    """A loss or gradient was NaN or infinite; the step was not taken."""


@dataclass
class StepResult:
    """One optimizer step. Tensors stay on the device: reading one waits for the GPU."""

    loss: torch.Tensor  # fp32 scalar: mean over the labelled tokens of all microbatches and ranks
    grad_norm: torch.Tensor  # before clipping
    finite: torch.Tensor  # bool: whether both of the above are, and the step was taken
    labelled: int  # tokens with loss, all ranks
    tokens: int  # real tokens, all ranks
    processed: int  # real tokens and filler, all ranks
    microbatches: int  # of this rank
    rows: list[int]  # dataset indices in this rank's microbatches, to name a culprit
    learning_rate: float
    waited: float = 0.0  # seconds spent waiting for data


def train_epoch(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    device: torch.device | str,
    **options: Any,
) -> float:
    """Train on every batch of a loader once.

    Args:
        model: a causal language model; it is left in training mode.
        loader: batches as dicts with `input_ids` and `labels`, shape (rows, length), -100
            where there is no loss; `position_ids`, `cu_seq_lens_*` or an `attention_mask` too.
        optimizer: steps on the model's trainable parameters.
        scaler: does work for fp16 only, whose small gradients vanish; None, or one that is
            disabled, for bf16 and fp32.
        device: where the batches go.
        **options: of `train_steps`: accumulation, max_grad_norm, scheduler, dtype, head.

    Returns:
        The mean loss of a labelled token over the epoch.

    Raises:
        NonFinite: a loss or gradient was NaN or infinite; the weights are those before the step.
    """
    total, labelled = torch.zeros((), device=device), 0
    for result in train_steps(model, loader, optimizer, scaler, device, **options):
        if not bool(result.finite):
            raise NonFinite(f"loss {result.loss.item()}, rows {result.rows}")
        total += result.loss * result.labelled
        labelled += result.labelled
    return total.item() / max(labelled, 1)


def train_steps(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    device: torch.device | str,
    *,
    accumulation: int = 1,
    max_grad_norm: float | None = 1.0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    dtype: torch.dtype = torch.bfloat16,
    head: PlainHead | None = None,
    freeze_on_non_finite: bool = True,
) -> Iterator[StepResult]:
    """Take an optimizer step for every `accumulation` batches, and yield what it did.

    A last, incomplete window steps on what is there. Either way the loss is a mean over
    labelled tokens, so a window of few weighs each token the same.

    A step whose loss or gradient is not finite is never taken. With `freeze_on_non_finite` no
    later one is either: the caller may look at `StepResult.finite` once in a while, without
    waiting for the GPU at each step, and still finds the weights as they were before it.
    """
    device = torch.device(device)
    model.train()
    if head is None:
        with autocast(device, dtype):
            head = find_plain_head(model)
    windows = iter(batched(loader, accumulation))
    healthy = torch.ones((), dtype=torch.bool, device=device)
    started = time.perf_counter()
    while window := next(windows, None):
        waited = time.perf_counter() - started
        result = train_step(
            model, window, optimizer, scaler, device, max_grad_norm, dtype, head, healthy
        )
        result.waited = waited
        if freeze_on_non_finite:
            healthy = healthy & result.finite
        if scheduler is not None:
            scheduler.step()
        yield result
        started = time.perf_counter()


def train_step(
    model: nn.Module,
    window: tuple[dict[str, Any], ...],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    device: torch.device,
    max_grad_norm: float | None,
    dtype: torch.dtype,
    head: PlainHead | None,
    healthy: torch.Tensor | None = None,
) -> StepResult:
    """One step: count labels → forward and backward of each microbatch → check → update.

    The divisor is the number of labels in the whole window on all ranks, known before the
    first backward pass. Averaging the microbatches' means instead weighs tokens by how lonely
    they are (transformers#34191).
    """
    window = tuple(_prepare(batch) for batch in window)
    labelled = int(distributed.all_sum(sum(b["labelled"] for b in window)))
    loss = torch.zeros((), device=device)
    for batch in window:
        on_device = _to_device(batch, device)
        with autocast(device, dtype):
            share = summed_loss(model, on_device, head) / max(labelled, 1)
        (scaler.scale(share) if scaler else share).backward()
        loss += share.detach()
    distributed.sum_gradients(model)
    distributed.sum_tensor(loss)
    if scaler:
        scaler.unscale_(optimizer)
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    finite = torch.isfinite(loss)
    if not (scaler and scaler.is_enabled()):  # whose first gradients overflow by design
        finite = finite & torch.isfinite(norm)
    if labelled:
        _update(optimizer, scaler, finite if healthy is None else finite & healthy)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=loss,
        grad_norm=norm,
        finite=finite,
        labelled=labelled,
        tokens=int(distributed.all_sum(sum(b["tokens"] for b in window))),
        processed=sum(b["input_ids"].numel() for b in window) * distributed.WORLD_SIZE,
        microbatches=len(window),
        rows=[row for b in window for row in b.get("rows", [])],
        learning_rate=optimizer.param_groups[0]["lr"],
    )


def _update(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, finite: torch.Tensor
) -> None:
    """Step, unless loss or gradients are not finite; without asking the GPU where possible."""
    if scaler and scaler.is_enabled():
        if bool(finite):  # of the loss
            scaler.step(optimizer)  # skips by itself where gradients overflowed
        scaler.update()  # and halves its scale then
    elif optimizer.defaults.get("fused"):
        # The kernel reads this flag on the device and leaves weights and moments alone: no
        # synchronisation. It is how GradScaler talks to fused optimizers too.
        vars(optimizer).update(found_inf=(~finite).float(), grad_scale=None)
        optimizer.step()
    elif bool(finite):
        optimizer.step()


@dataclass
class EvalResult:
    """Loss of the labelled tokens of a whole dataset."""

    loss: float
    perplexity: float
    labelled: int


@torch.no_grad()  # not inference_mode: caches that a model fills in it cannot be trained with
def evaluate(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    head: PlainHead | None = None,
) -> EvalResult:
    """Mean loss per labelled token, and its exponential; the model's mode is put back.

    Sums, not means of means; and no logits are kept, so that what trains also evaluates.
    """
    device = torch.device(device)
    training = model.training
    model.eval()
    total, labelled = torch.zeros((), device=device), 0
    with autocast(device, dtype):
        head = head or find_plain_head(model)
        for batch in map(_prepare, loader):
            total += summed_loss(model, _to_device(batch, device), head)
            labelled += batch["labelled"]
    model.train(training)
    distributed.sum_tensor(total)
    labelled = int(distributed.all_sum(labelled))
    loss = total.item() / max(labelled, 1)
    return EvalResult(loss, math.exp(min(loss, 700.0)), labelled)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to `dtype`; nothing for fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _prepare(batch: dict[str, Any]) -> dict[str, Any]:
    """Add where the labels are and how many, which has to happen on the CPU."""
    if "positions" in batch:
        return batch
    positions, targets = label_positions(batch["labels"])
    labelled = batch.get("labelled", int((batch["labels"][:, 1:] != IGNORE).sum()))
    tokens = batch.get("tokens", batch["input_ids"].numel())
    return {**batch, "positions": positions, "targets": targets} | {
        "labelled": labelled,
        "tokens": tokens,
    }


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    names = (*MODEL_INPUTS, "positions", "targets")
    return {
        # non_blocking: the loader pins its memory, so the copy runs beside the step before.
        k: v.to(device, non_blocking=True) if isinstance(v := batch[k], torch.Tensor) else v
        for k in names
        if k in batch
    }
