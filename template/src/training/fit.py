"""A whole training: epochs of steps, and between them logging, evaluation and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from src.config import TrainingConfig
from src.models.model import lean_adapters
from src.training import distributed
from src.training.checkpoint import Training, save_checkpoint
from src.training.loss import PlainHead, find_plain_head
from src.training.recorder import Recorder
from src.training.signals import StopSignal
from src.training.speed import Speed
from src.training.trainer import StepResult, autocast, evaluate, train_steps
from src.utils.errors import Interrupted, RunError
from src.utils.memory import gpu_memory


class Fit:
    """Runs a `Training` to its last step; every decision about *when* is in `_after_step`."""

    def __init__(
        self,
        training: Training,
        train_loader: Any,
        eval_loader: Iterable | None,
        settings: TrainingConfig,
        device: torch.device,
        dtype: torch.dtype,
        total_steps: int,
        recorder: Recorder | None,
        checkpoints: Path,
        identity: dict[str, Any],
        stop: StopSignal,
        speed: Speed | None = None,
    ) -> None:
        self.training, self.settings = training, settings
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.device, self.dtype, self.total_steps = device, dtype, total_steps
        self.recorder, self.checkpoints, self.identity = recorder, checkpoints, identity
        self.stop, self.speed = stop, speed
        self.head: PlainHead | None = None
        patience = settings.patience
        self.finished = training.state.step >= total_steps or bool(
            patience and training.state.evaluations_without_gain >= patience
        )
        self.interval = _Interval()

    def run(self) -> None:
        """Train until the last step, early stopping, or a signal.

        Raises:
            Interrupted: after a signal, with the state saved.
            RunError: a loss or gradient was not finite and `on_non_finite` is `stop`, or a
                checkpoint could not be written.
        """
        model, state, sampler = self.training.model, self.training.state, self.train_loader.sampler
        with lean_adapters(model), autocast(self.device, self.dtype):
            self.head = find_plain_head(model)
        with lean_adapters(model):
            self.interval = _Interval()
            while not self.finished:
                sampler.epoch, sampler.position = state.epoch, state.position
                for result in train_steps(
                    model,
                    self.train_loader,
                    self.training.optimizer,
                    self.training.scaler,
                    self.device,
                    accumulation=self.settings.gradient_accumulation_steps,
                    max_grad_norm=self.settings.max_grad_norm,
                    scheduler=self.training.scheduler,
                    dtype=self.dtype,
                    head=self.head,
                    freeze_on_non_finite=self.settings.on_non_finite == "stop",
                ):
                    self._after_step(result)
                    if self.finished:
                        break
                else:
                    state.epoch, state.position = state.epoch + 1, 0

    def _after_step(self, result: StepResult) -> None:
        state, settings, stop = self.training.state, self.settings, self.stop
        state.step += 1
        state.position += result.microbatches
        state.tokens += result.tokens
        self.interval.add(result)
        if self.recorder:
            self.recorder.advance(state.step)
        self.finished = state.step >= self.total_steps
        stopping = stop.requested() and not self.finished
        evaluating = self.eval_loader is not None and (
            self.finished or _due(state.step, settings.eval_every)
        )
        saving = stopping or self.finished or _due(state.step, settings.save_every)
        if not (evaluating or saving or _due(state.step, settings.log_every)):
            return
        metrics = self._collect()
        if evaluating and not stopping:
            saving |= self._evaluate(metrics)
        if self.recorder:
            self.recorder.log(metrics)
        # After the log line: a resumed run then finds every line up to its checkpoint written.
        if saving and settings.save_every is not None:
            self._save()
        if stopping:
            raise Interrupted(self._farewell(), stop.exit_code)
        self.interval = _Interval()  # its clock leaves out evaluating and saving

    def _collect(self) -> dict[str, Any]:
        """Read the interval's numbers from the device: the only place that waits for it."""
        state = self.training.state
        metrics = self.interval.read(self.speed)
        for rows in metrics.pop("non_finite_rows"):
            state.skipped += 1
            if self.settings.on_non_finite == "stop":
                raise RunError(
                    f"step {state.step}: the loss or a gradient is not finite; the step was not "
                    f"taken. Its batches held rows {rows} of data.train (counted from 0). "
                    "Lower training.learning_rate, mend the rows, or go on without such steps "
                    "with training.on_non_finite=skip"
                )
        state.skipped += metrics.pop("unlabelled_steps")
        memory = gpu_memory() if self.device.type == "cuda" else {}
        return {
            "step": state.step,
            "epoch": round(state.epoch + state.position / len(self.train_loader.sampler), 4),
            "loss": metrics.pop("loss"),
            "learning_rate": metrics.pop("learning_rate"),
            "grad_norm": metrics.pop("grad_norm"),
            "tokens": state.tokens,
            **metrics,
            "skipped_steps": state.skipped,
            **({"peak_memory_gib": round(memory["peak"], 3)} if memory else {}),
        }

    def _evaluate(self, metrics: dict[str, Any]) -> bool:
        """Add the evaluation to `metrics`; return whether the state is worth keeping now."""
        state = self.training.state
        result = evaluate(
            self.training.model, self.eval_loader or [], self.device, self.dtype, self.head
        )
        metrics |= {"eval_loss": result.loss, "perplexity": result.perplexity}
        if result.loss < state.best_loss:
            state.best_loss, state.best_step = result.loss, state.step
            state.evaluations_without_gain = 0
            return True
        state.evaluations_without_gain += 1
        if self.settings.patience and state.evaluations_without_gain >= self.settings.patience:
            self.finished = True
            return True
        return False

    def _save(self) -> None:
        if distributed.is_main():
            if self.recorder and self.recorder.tracker:
                self.training.state.tracking_run = self.recorder.tracker.run_id
            save_checkpoint(
                self.training, self.checkpoints, self.identity, self.settings.keep_checkpoints
            )
        distributed.barrier()

    def _farewell(self) -> str:
        step = self.training.state.step
        saved = (
            f"its state is saved under {self.checkpoints}"
            if self.settings.save_every
            else "nothing is saved, since training.save_every is null"
        )
        return f"stopped by {self.stop.name} after step {step} of {self.total_steps}; {saved}"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Interval:
    """Device tensors and plain counts since the last log line."""

    def __init__(self) -> None:
        self._results: list[StepResult] = []
        self._started = time.perf_counter()

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    def read(self, speed: Speed | None) -> dict[str, Any]:
        """Reduce to a log line's numbers."""
        results = self._results
        values = torch.stack(
            [torch.stack([r.loss, r.grad_norm.float(), r.finite.float()]) for r in results]
        ).tolist()
        seconds = time.perf_counter() - self._started
        labelled = sum(r.labelled for r in results)
        good = [(v, r) for v, r in zip(values, results, strict=True) if v[2] and r.labelled]
        weight = sum(r.labelled for _, r in good)
        tokens = sum(r.tokens for r in results)
        processed = sum(r.processed for r in results)
        devices = distributed.WORLD_SIZE
        return {
            "loss": sum(v[0] * r.labelled for v, r in good) / weight if weight else float("nan"),
            "grad_norm": values[-1][1],
            "learning_rate": results[-1].learning_rate,
            "tokens_per_second": tokens / seconds,
            "labelled_tokens_per_second": labelled / seconds,
            **({"mfu": speed.utilisation(tokens, labelled, seconds, devices)} if speed else {}),
            "filler_share": 1 - tokens / processed,
            "data_wait_share": sum(r.waited for r in results) / seconds,
            "non_finite_rows": [r.rows for v, r in zip(values, results, strict=True) if not v[2]],
            "unlabelled_steps": sum(not r.labelled for r in results),
        }
