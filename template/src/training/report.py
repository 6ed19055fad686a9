"""What people read of a run: its figures, log lines, `metrics.jsonl`, curve and summary."""

import json
import math
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
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
from src.training import strategy
from src.training.checkpoint import TrainState
from src.training.optimizer import bytes_a_weight
from src.training.plan import plan
from src.training.record import Record, read_metrics, rewind_metrics
from src.training.speed import Speed
from src.training.tracking import Tracker, where_to_look
from src.training.trainer import StepResult
from src.utils import distributed
from src.utils.environment import from_root
from src.utils.errors import Interrupted, RunError
from src.utils.files import write_text
from src.utils.memory import GIB, clear_memory, print_gpu_memory

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
    """The arithmetic of the run, before step 1."""
    training, data, length = config.training, train.dataset, config.data.max_length
    trainable, quantized, total = count_parameters(model)
    attention = model.config._attn_implementation
    bits = f"{config.model.quantization} ({quantized / total:.0%} of it)"
    bits = bits if quantized else "not quantized"
    weights = "random weights" if config.model.init == "random" else bits
    adapter = getattr(model, "peft_config", {}).get("default")  # as it is: it may be a saved one
    base = getattr(adapter, "base_model_name_or_path", None)
    kind = f"LoRA r={adapter.r} alpha={adapter.lora_alpha}" if adapter else "all weights"
    tokens, labelled = int(data.lengths.sum()), data.facts.labelled_tokens
    to_evaluate = f"; {len(evaluation.dataset):,} rows to evaluate on" if evaluation else ""
    window, world = training.gradient_accumulation_steps, distributed.WORLD_SIZE
    real = tokens / (train.sampler.batches * training.batch_size * length)
    fill = f"{real:.1%} of them real" if train.packing else "padded"
    epoch, rate = -(-len(train.sampler) // window), training.learning_rate
    ways = f"{training.scheduler} from {rate:g}, {training.warmup_steps} warm-up"
    shapes = ", ".join(f"{n:,} as {shape}" for shape, n in data.facts.read_as.items())
    precision = str(dtype).removeprefix("torch.")
    held = total * bytes_a_weight(training, dtype) / GIB if config.lora is None else 0
    apart = f"not packed: in {model.config.model_type} packed documents would see each other"
    for name, text in (
        ("model", f"{config.model.name}, {weights}: {kind} trained, {trainable:,} of {total:,}"),
        ("", f"{precision} on {model.device.type}, {attention} attention"),
        ("", adapter and f"adapters on {', '.join(adapted_names(model))}"),
        ("", config.lora and config.lora.adapter
         and f"going on from {config.lora.adapter}, made on {base}"),
        ("", held > 0.1 and f"{held:.1f} GiB for weights, gradients and moments"),
        ("data", f"{len(data):,} rows, {tokens:,} tokens, {labelled:,} labelled"
         f" ({labelled / tokens:.0%}){to_evaluate}"),
        ("", f"read {shapes}"),
        *(("", line) for line in data_notes(data.facts, config.data)),
        ("batch", f"{training.batch_size} x {length} tokens x {window} accumulated x {world} "
         f"process{'es' * (world > 1)}, {fill}"),
        ("", config.data.packing and not train.packing and apart),
        ("schedule", f"{total_steps:,} steps, {epoch:,} an epoch; {ways}"),
        ("speed", f"{speed.per_token / 1e9:.3g} GFLOP a token; a matmul does "
         f"{speed.matmul / 1e12:.3g} TFLOP/s here, of which mfu is the share in use"),
    ):  # fmt: skip
        if text:
            say(f"{name:<10} {text}")
    for warning in _warnings(config, model, train, evaluation, total_steps):
        say(f"warning: {warning}")


def keep_left_out(loaders: Iterable[TokenLoader | None], folder: Path) -> None:
    """Write down in the run's folder which rows were left out as unusable."""
    lines: dict[bytes, None] = {}  # once, where both sets come from the same rows
    for loader in filter(None, loaders):
        lines |= dict.fromkeys(loader.dataset.left_out.read_bytes().splitlines(keepends=True))
    if lines:
        (folder / "left_out.jsonl").write_bytes(b"".join(lines))


def _warnings(
    config: Config, model: PreTrainedModel, train: TokenLoader, evaluation: TokenLoader | None,
    total_steps: int,
) -> Iterator[str]:  # fmt: skip
    """What is allowed, and seldom meant."""
    rate, pretrained = config.training.learning_rate, config.model.init == "pretrained"
    if config.lora is None and pretrained and rate > 1e-4:
        yield f"training.learning_rate={rate:g} suits LoRA; full fine-tuning takes about 2e-5"
    _, quantized, total = count_parameters(model)
    if 0 < quantized < total / 2:
        bits, share = config.model.quantization, quantized / total
        yield f"{bits} reaches {share:.0%} of the weights: layers, but no parameters of experts"
    if config.lora and (names := ", ".join(frozen_experts(model))):
        yield f"no adapter reaches the experts; lora.target_parameters=[{names}] adds some"
    known: Any = model.config
    limit = getattr(known.get_text_config(), "max_position_embeddings", None)
    longest, settings = int(train.dataset.lengths.max()), config.training
    if limit and longest > limit:
        yield (
            f"the longest document has {longest:,} tokens, and the model was made for {limit:,} "
            f"positions; data.max_length={limit} keeps within them"
        )
    if settings.warmup_steps > total_steps:
        reached = settings.learning_rate * total_steps / settings.warmup_steps
        yield (
            f"training.warmup_steps={settings.warmup_steps} in a run of {total_steps} steps: the "
            f"rate ends at {reached:.2g} and never reaches {settings.learning_rate:g}"
        )
    if evaluation is not None and len(evaluation.dataset) < FEW and not settings.overfit:
        few = f"{len(evaluation.dataset)} documents to evaluate on"
        yield f"only {few}: the best evaluation is chosen by them; use more rows for data.eval"


def warn_of_rate(state: TrainState, rate: float, total_steps: int) -> None:
    """Say it where a resumed run goes on at another learning rate than it was saved with.

    The rate follows from the configuration: more epochs stretch a schedule that had ended.
    """
    saved = state.learning_rate
    if saved is not None and not math.isclose(saved, rate, rel_tol=0.01):
        say(
            f"warning: after step {state.step} the learning rate jumps from {saved:.2g} to "
            f"{rate:.2g}: the schedule has changed, and now covers {total_steps} steps. A lower "
            "training.learning_rate, or training.scheduler=constant, makes the jump smaller"
        )


def show_memory(
    config: Config, device: torch.device, dtype: torch.dtype, shared: str
) -> float | None:
    """On a GPU say what loading left there, and what a step is planned to take.

    Returns:
        GiB that the peak of a step should be; None where it is not known.
    """
    if device.type != "cuda":
        return None
    clear_memory()  # what loading left: the peak is then that of training
    distributed.on_main(print_gpu_memory, "memory    ")
    if strategy.shards(shared) > 1:
        return None
    try:
        planned = plan(config, dtype)
    except Exception as error:  # noqa: BLE001 - a model that cannot be walked can be trained
        say(f"planned    not known: {type(error).__name__}")
        return None
    peak = planned.peak_gib - planned.overhead  # which torch does not count either
    parts = f"weights {planned.weights:.2f}, activations {planned.activations:.2f}"
    say(f"planned    {peak:.2f} GiB at the peak: {parts}, gradients and moments the rest")
    return peak


def show_example(train: TokenLoader, tokenizer: Tokenizer) -> None:
    """The first document as the model sees it, what carries loss between [ and ]."""
    shown = show_document(train.dataset[[0]][0], tokenizer).replace("\n", "\\n")
    say("example    " + (shown if len(shown) <= 300 else f"{shown[:300]} …"))


FEW = 10  # documents: a loss on fewer says little


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

    A context manager around all that writes into the run's folder: it starts the tracker, and
    tells it in the end whether the run finished, failed or was stopped. Processes other than
    the main one add up the same numbers and write nothing.
    """

    def __init__(
        self, config: Config, written: dict[str, Any], state: TrainState, total_steps: int,
        speed: Speed, loaders: Sequence[TokenLoader | None] = (), planned: float | None = None,
    ) -> None:  # fmt: skip
        self.fingerprints = {
            name: loader.dataset.facts.fingerprint
            for name, loader in zip(("train", "eval"), loaders, strict=False)
            if loader is not None
        }
        self.config, self.written, self.state = config, written, state
        self.total_steps, self.planned = total_steps, planned
        self.folder, self.speed = from_root(config.output_dir), speed
        self.checkpoints = self.folder / "checkpoints"
        self.record: Record | None = None
        self.tracker: Tracker | None = None
        self.result = ""
        self._steps: list[StepResult] = []
        self.clear()

    def __enter__(self) -> Self:
        self.bar = tqdm(
            total=self.total_steps, initial=self.state.step, unit="step", dynamic_ncols=True,
            disable=None if distributed.is_main() else True,  # None: where nobody watches
        )  # fmt: skip
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.yaml", OmegaConf.to_yaml(self.written))
            for name in ("metrics.jsonl", "samples.jsonl"):
                rewind_metrics(self.folder / name, self.state.step)
            self.record = Record.start(
                self.folder, self.written, self.fingerprints, self.state.step
            )
            if self.config.tracking.enabled:
                self.tracker = Tracker(say)
                self.tracker.start(self.record)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        stopped = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
        status = "KILLED" if stopped else "FAILED" if kind else "FINISHED"
        if self.record:
            self.record.update(status=status, ended=int(time.time() * 1000))
        if self.tracker:
            self.tracker.close(status)

    def conclude(self, step: int, why: str) -> None:
        """Say of which step the result is, wherever somebody may look for it."""
        self.result = result = f"step {step:,} of {self.state.step:,}, {why}"
        if self.record:
            told = f"# final/ holds {result}\n{OmegaConf.to_yaml(self.written)}"
            write_text(self.folder / "config.yaml", told)
            self.record.update(final=result, final_step=step)

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
        """The numbers of these steps, the last ones taken; an epoch has so many batches."""
        seconds, state = time.perf_counter() - self._started, self.state
        # Ranks without a batch got filler, which counts in `position`.
        epoch = state.epoch + min(state.position / batches, 1)
        tokens, labelled = sum(s.tokens for s in steps), sum(s.labelled for s in steps)
        good = [step for step in steps if step.finite]
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
        # A NaN is not JSON, so it is written as null.
        clean = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        clean["time"] = round(time.time(), 3)
        if distributed.is_main():
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
        say(self._line(metrics))
        if self.planned and (peak := metrics.get("peak_memory_gib")):
            more = f"{100 * (peak / self.planned - 1):+.0f} % of what was planned"
            say(f"measured   {peak:.2f} GiB at the peak of {metrics['step']} steps, {more}")
            self.planned = None
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


def figure(value: float | None, form: str = ".4f") -> str:
    """Write a number of `metrics.jsonl`, where null stands for NaN and infinity."""
    return "not finite" if value is None else format(value, form)


def draw_curves(folders: Sequence[Path], picture: Path) -> None:
    """Draw the training and evaluation loss of one run or several over their steps."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, folder in enumerate(folders):
        rows, name = read_metrics(folder / "metrics.jsonl"), f"{folder.name}: " * (len(folders) > 1)
        for key, label, style in (("loss", "training", "-"), ("eval_loss", "evaluation", "o--")):
            # A null is drawn as a gap.
            if points := [(row["step"], row[key]) for row in rows if key in row]:
                color = f"C{number}" if name else None
                axes.plot(*zip(*points, strict=True), style, label=name + label, color=color)
    axes.set(xlabel="optimizer step", ylabel="loss per labelled token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(picture)


def summarise(config: Config, result: str) -> None:
    """What came out, where it is, and what to do next."""
    rows = read_metrics(from_root(config.output_dir) / "metrics.jsonl")
    here = shlex.quote(config.output_dir)
    if rows:
        last, names = rows[-1], {"loss": "loss", "eval_loss": "evaluation"}
        losses = [f"{names[key]} {figure(last[key])}" for key in names if key in last]
        say(f"\ndone       {last['step']} steps, {', '.join(losses)}")
    else:
        say("\ndone       nothing was left to train")
    say(f"model      {here}/final: {result}")
    if rows:
        say(f"curve      {here}/loss.png, numbers in metrics.jsonl beside it")
    if config.tracking.enabled and distributed.is_main():
        say(f"runs       {where_to_look(Record(from_root(config.output_dir)))}")
    say(f'next       uv run scripts/inference.py {here}/final "your question"')
