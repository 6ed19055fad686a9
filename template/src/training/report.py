"""What people read of a run: its printed lines, `metrics.jsonl`, curve and summary."""

import json
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.batching import TokenLoader
from src.data.describe import data_notes, show_document
from src.models.adapters import adapted_names, frozen_experts
from src.models.model import count_parameters
from src.training.checkpoint import TrainState
from src.training.fit import gib_held
from src.training.metrics import read_metrics, rewind_metrics
from src.training.optimizer import rate_factor
from src.training.record import Record
from src.training.speed import Speed
from src.training.tracking import Tracker, where_to_look
from src.training.trainer import StepResult
from src.utils import distributed
from src.utils.environment import from_root
from src.utils.errors import Interrupted, RunError
from src.utils.files import write_text
from src.utils.memory import GIB

FEW = 10  # documents: a loss on fewer says little
NOT_FINITE = (
    "step {}: the loss or a gradient is not finite; the step was not taken. Its batches held rows "
    "{} of data.train (counted from 0). Lower training.learning_rate, correct the rows, or set "
    "training.on_non_finite=skip to go on without such steps"
)


def say(text: str) -> None:
    """Print on the main process only, without tearing its progress bar."""
    if distributed.is_main():
        with tqdm.external_write_mode():
            print(text, flush=True)


def describe(
    config: Config, model: PreTrainedModel, dtype: torch.dtype, train: TokenLoader,
    evaluation: TokenLoader | None, total_steps: int, speed: Speed,
) -> None:  # fmt: skip
    """Print what is trained, on what, and how: before step 1."""
    settings, length, data = config.training, config.data.max_length, train.dataset
    rows, window = settings.batch_size, settings.gradient_accumulation_steps
    tokens, labelled = int(data.lengths.sum()), data.facts.labelled_tokens
    fill = "padded"
    if train.packing:
        fill = f"{tokens / (train.sampler.batches * rows * length):.1%} of them real"
    _describe_model(config, model, dtype)
    share = f"{labelled:,} labelled ({labelled / tokens:.0%})"
    say(f"data       {len(data):,} rows, {tokens:,} tokens, {share}")
    if evaluation:
        say(f"           {len(evaluation.dataset):,} rows to evaluate on")
    shapes = [f"{count:,} as {shape}" for shape, count in data.facts.read_as.items()]
    say(f"           read {', '.join(shapes)}")
    for note in data_notes(data.facts):
        say(f"           {note}")
    world = distributed.WORLD_SIZE
    say(f"batch      {rows} x {length} tokens, {fill}; accumulation {window}, processes {world}")
    if config.data.packing and not train.packing:
        kind = model.config.model_type
        say(f"           not packed: {kind} would let packed documents attend to each other")
    say(
        f"schedule   {total_steps:,} steps, {-(-len(train.sampler) // window):,} an epoch; "
        f"{settings.scheduler} from {settings.learning_rate:g}, {settings.warmup_steps} warm-up"
    )
    say(
        f"speed      mfu is the share of this machine's matmul speed, {speed.matmul / 1e12:.3g} "
        f"TFLOP/s, that training uses; a token takes {speed.per_token / 1e9:.3g} GFLOP"
    )
    for warning in _warnings(config, model, train, evaluation, total_steps):
        say(f"warning: {warning}")


def _describe_model(config: Config, model: PreTrainedModel, dtype: torch.dtype) -> None:
    trainable, quantized, total = count_parameters(model)
    weights = "not quantized"
    if config.model.init == "random":
        weights = "random weights"
    elif quantized:
        weights = f"{config.model.quantization} ({quantized / total:.0%} of the weights)"
    say(f"model      {config.model.name}, {weights}; {trainable:,} of {total:,} weights trained")
    attention, precision = model.config._attn_implementation, str(dtype).removeprefix("torch.")
    say(f"           {precision} on {model.device.type}, {attention} attention")
    if config.lora is None:
        held = gib_held(config, dtype, total)
        say(f"           {held:.2g} GiB for weights, gradients and moments")
        return
    made: Any = model.peft_config["default"]  # a saved adapter may differ from the config's
    layers = ", ".join(adapted_names(model))
    say(f"           LoRA r={made.r} alpha={made.lora_alpha} on {layers}")
    if config.lora.adapter:
        base = made.base_model_name_or_path
        say(f"           continues {config.lora.adapter}, which was made on {base}")


def _warnings(
    config: Config, model: PreTrainedModel, train: TokenLoader, evaluation: TokenLoader | None,
    total_steps: int,
) -> Iterator[str]:  # fmt: skip
    """Settings that are allowed and rarely meant."""
    settings, rate = config.training, config.training.learning_rate
    if config.lora is None and config.model.init == "pretrained" and rate > 1e-4:
        yield f"training.learning_rate={rate:g} suits LoRA; use about 2e-5 to train all weights"
    _, quantized, total = count_parameters(model)
    if 0 < quantized < total / 2:
        bits = config.model.quantization
        yield f"{bits} quantizes only {quantized / total:.0%} of the weights: layers, not experts"
    experts = frozen_experts(model) if config.lora else []
    if experts:
        names = ", ".join(experts)
        yield f"experts get no adapters; lora.target_parameters=[{names}] adds some"
    known: Any = model.config
    limit = getattr(known.get_text_config(), "max_position_embeddings", None)
    longest = int(train.dataset.lengths.max())
    if limit and longest > limit:
        yield (
            f"the longest document has {longest:,} tokens, and the model was made for {limit:,} "
            f"positions; data.max_length={limit} keeps within them"
        )
    warmup = settings.warmup_steps
    if warmup > total_steps:
        yield (
            f"training.warmup_steps={warmup} in a run of {total_steps} steps: the rate ends at "
            f"{rate * total_steps / warmup:.2g} and never reaches {rate:g}"
        )
    if evaluation and len(evaluation.dataset) < FEW and not settings.overfit:
        yield (
            f"only {len(evaluation.dataset)} documents to evaluate on, and they choose the best "
            "checkpoint; use more rows for data.eval"
        )


def describe_resume(path: Path, state: TrainState, config: Config, total_steps: int) -> None:
    """Say where a run goes on, and whether its learning rate jumps there.

    The rate follows from the configuration: more epochs stretch a schedule that had ended.
    """
    settings, saved = config.training, state.learning_rate
    say(f"resume     {path.name} of {path.parent}")
    if state.step >= total_steps:
        key = "max_steps" if settings.max_steps == total_steps else "epochs"
        say(f"finished   all {total_steps} steps are done; a larger training.{key} adds more")
        return
    rate = settings.learning_rate * rate_factor(settings, total_steps, state.step)
    if saved is not None and not math.isclose(saved, rate, rel_tol=0.01):
        say(
            f"warning: after step {state.step} the learning rate jumps from {saved:.2g} to "
            f"{rate:.2g}: the schedule has changed, and now covers {total_steps} steps. A lower "
            "training.learning_rate, or training.scheduler=constant, makes the jump smaller"
        )


def show_example(train: TokenLoader, tokenizer: Tokenizer) -> None:
    """Print the first document as the model reads it; tokens with loss are between [ and ]."""
    text = show_document(train.dataset[[0]][0], tokenizer).replace("\n", "\\n")
    say("example    " + (text if len(text) <= 300 else f"{text[:300]} …"))


def check_finite(steps: list[StepResult], state: TrainState, on_non_finite: str) -> None:
    """Count the steps that were not taken, for want of labels or of finite numbers.

    Raises:
        RunError: a step was not finite, and `training.on_non_finite` is `stop`.
    """
    for number, step in enumerate(steps, state.step - len(steps) + 1):
        state.skipped += not (step.finite and step.labelled)
        if not step.finite and on_non_finite == "stop":
            raise RunError(NOT_FINITE.format(number, step.rows))


class Recorder:
    """Writes a line of numbers everywhere: `metrics.jsonl` first, then the terminal and MLflow.

    A context manager around everything that writes into the run's folder. It starts the record and
    the tracker, and in the end writes whether the run finished, failed or was stopped. Processes
    other than the main one compute the same numbers and write nothing.
    """

    def __init__(
        self, config: Config, written: dict[str, Any], state: TrainState, total_steps: int,
        speed: Speed, loaders: Sequence[TokenLoader | None] = (), tracker: Tracker | None = None,
    ) -> None:  # fmt: skip
        self.written, self.state, self.total_steps = written, state, total_steps
        self.speed, self.loaders = speed, loaders
        self.tracker = tracker if distributed.is_main() else None
        self.folder = from_root(config.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.record: Record | None = None
        self.result = ""
        self._steps: list[StepResult] = []
        self.clear()

    def __enter__(self) -> Self:
        self.bar = tqdm(
            total=self.total_steps, initial=self.state.step, unit="step", dynamic_ncols=True,
            disable=None if distributed.is_main() else True,  # None: off where it is no terminal
        )  # fmt: skip
        if distributed.is_main():
            self._start_record()
        return self

    def _start_record(self) -> None:
        folder, step, fingerprints = self.folder, self.state.step, {}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(self.written))
        for name in ("metrics.jsonl", "samples.jsonl"):
            rewind_metrics(folder / name, step)
        left_out: dict[bytes, None] = {}  # a row once, where both sets come from the same rows
        for name, loader in zip(("train", "eval"), self.loaders, strict=False):
            if loader is not None:
                fingerprints[name] = loader.dataset.facts.fingerprint
                lines = loader.dataset.left_out.read_bytes().splitlines(keepends=True)
                left_out |= dict.fromkeys(lines)
        if left_out:
            (folder / "left_out.jsonl").write_bytes(b"".join(left_out))
        self.record = Record.start(folder, self.written, fingerprints, step)
        if self.tracker:
            self.tracker.start(self.record)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        status = "FAILED" if kind else "FINISHED"
        if kind and issubclass(kind, Interrupted | KeyboardInterrupt):
            status = "KILLED"
        if self.record:
            self.record.update(status=status, ended=int(time.time() * 1000))
        if self.tracker:
            self.tracker.close(status)

    def conclude(self, step: int, reason: str) -> None:
        """Write down of which step the result is."""
        self.result = f"step {step:,} of {self.state.step:,}, {reason}"
        if self.record:
            text = f"# final/ holds {self.result}\n{OmegaConf.to_yaml(self.written)}"
            write_text(self.folder / "config.yaml", text)
            self.record.update(final=self.result, final_step=step)

    def clear(self) -> None:
        """Restart the clock of the next line; it leaves out evaluating and saving."""
        self._started = time.perf_counter()

    def add(self, step: StepResult) -> None:
        """Keep a step for the next line, without waiting for the GPU."""
        self._steps.append(step)
        self.bar.update()

    def take_steps(self) -> list[StepResult]:
        """The steps since the last line, their tensors on the CPU.

        Copying them waits for the device: nothing else in training does.
        """
        steps, self._steps = self._steps, []
        rows = torch.stack([torch.stack([s.loss, s.grad_norm, s.finite]) for s in steps]).cpu()
        return [
            replace(step, loss=loss, grad_norm=norm, finite=finite > 0)
            for step, (loss, norm, finite) in zip(steps, rows, strict=True)
        ]

    def measure(self, steps: list[StepResult], batches: int) -> dict[str, Any]:
        """The numbers of the steps since the last line; `batches` is the length of an epoch."""
        seconds, state = time.perf_counter() - self._started, self.state
        # `position` also counts the filler of ranks that had no batch left.
        epoch = state.epoch + min(state.position / batches, 1)
        tokens, labelled = sum(s.tokens for s in steps), sum(s.labelled for s in steps)
        good = [step for step in steps if step.finite and step.labelled]
        total = sum(float(step.loss) * step.labelled for step in good)
        metrics = {
            "step": state.step,
            "epoch": round(epoch, 4),
            "loss": total / sum(step.labelled for step in good) if good else math.nan,
            "learning_rate": steps[-1].learning_rate,
            "grad_norm": float(steps[-1].grad_norm),
            "tokens": state.tokens,
            "tokens_per_second": tokens / seconds,
            "labelled_tokens_per_second": labelled / seconds,
            "mfu": self.speed.utilisation(tokens, labelled, seconds, distributed.WORLD_SIZE),
            "filler_share": 1 - tokens / sum(s.processed for s in steps),
            "data_wait_share": sum(s.waited for s in steps) / seconds,
            "skipped_steps": state.skipped,
        }
        if peak := torch.cuda.max_memory_allocated():  # 0 where CUDA was not started
            metrics["peak_memory_gib"] = round(peak / GIB, 3)
        return metrics

    def log(self, metrics: dict[str, Any]) -> None:
        """Write one line everywhere; keys as in `metrics.jsonl`."""
        if distributed.is_main():
            # A NaN is not JSON, so it is written as null.
            line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            line["time"] = round(time.time(), 3)
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        say(self._line(metrics))
        if self.tracker:
            self.tracker.wake()

    def _line(self, m: dict[str, Any]) -> str:
        line = (
            f"step {m['step']:>{len(str(self.total_steps))}}/{self.total_steps} · epoch "
            f"{m['epoch']:.2f} · loss {m['loss']:.4f} · lr {m['learning_rate']:.2e} · grad "
            f"{m['grad_norm']:.2f} · {m['tokens_per_second']:,.0f} tok/s · mfu {m['mfu']:.0%}"
        )
        if "peak_memory_gib" in m:
            line += f" · {m['peak_memory_gib']:.1f} GiB"
        if "eval_loss" in m:
            line += f" · eval loss {m['eval_loss']:.4f}, perplexity {m['perplexity']:.2f}"
        return line


def _loss(value: float | None) -> str:
    """A loss of `metrics.jsonl`, where null stands for NaN and infinity."""
    return "not finite" if value is None else f"{value:.4f}"


def summarise(config: Config, result: str, only_text: bool) -> None:
    """Print what came out, where it is, and what to do next.

    A model that was trained on plain text alone is asked without a chat template.
    """
    folder, here = from_root(config.output_dir), shlex.quote(config.output_dir)
    if rows := read_metrics(folder / "metrics.jsonl"):
        last = rows[-1]
        losses = f"loss {_loss(last['loss'])}"
        if "eval_loss" in last:
            losses += f", evaluation {_loss(last['eval_loss'])}"
        say(f"\ndone       {last['step']} steps, {losses}")
        say(f"curve      {here}/loss.png, numbers in metrics.jsonl beside it")
    else:
        say("\ndone       nothing was left to train")
    say(f"model      {here}/final: {result}")
    if config.tracking.enabled and distributed.is_main():
        say(f"runs       {where_to_look(Record(folder))}")
    question = '--raw "a beginning"' if only_text else '"your question"'
    say(f"next       uv run scripts/inference.py {here}/final {question}")
