"""What people read of a run: its printed lines, `metrics.jsonl`, curve and summary."""

import json
import math
import shlex
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config
from src.data.batching import TokenLoader
from src.data.dataset import TokenDataset
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
from src.utils.errors import Interrupted
from src.utils.files import METRICS, STEPS, free_name, write_text
from src.utils.memory import GIB

FEW = 10  # documents: a loss on fewer says little


def say(text: str) -> None:
    """Print on the main process only, without tearing its progress bar."""
    if distributed.is_main():
        with tqdm.external_write_mode():
            print(text, flush=True)


def count(number: int, noun: str) -> str:
    """A number with its noun: 1 row, 2,000 rows."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def say_lines(name: str, *lines: str) -> None:
    """Print lines as a paragraph with a name."""
    say(f"{name:<11}" + f"\n{'':<11}".join(lines))


def describe(
    config: Config, model: PreTrainedModel, dtype: torch.dtype, train: TokenLoader,
    evaluation: TokenLoader | None, total_steps: int, speed: Speed,
) -> None:  # fmt: skip
    """Print what is trained, on what, and how: before step 1."""
    settings, data, facts = config.training, train.dataset, train.dataset.facts
    size = f"{settings.batch_size} x {config.data.max_length}"
    window, tokens = settings.gradient_accumulation_steps, int(data.lengths.sum())
    say_lines("model", *_model_lines(config, model, dtype))
    share = f"{facts.labelled_tokens:,} labelled ({facts.labelled_tokens / tokens:.0%})"
    lines = [f"{count(len(data), 'row')}, {tokens:,} tokens, {share}"]
    if evaluation:
        same = " (the same rows)" * same_rows(data, evaluation.dataset)
        lines.append(f"{count(len(evaluation.dataset), 'row')} to evaluate on{same}")
    say_lines("data", *lines, *data_notes(facts))
    lines, fill = [], "padded"
    if train.packing:
        room = train.sampler.batches * settings.batch_size * config.data.max_length
        fill = f"{tokens / room:.1%} of them real"
    elif config.data.packing:
        kind = model.config.model_type
        lines = [f"not packed: {kind} would let packed documents attend to each other"]
    processes = f"accumulation {window}, processes {distributed.WORLD_SIZE}"
    say_lines("batch", f"{size} tokens, {fill}; {processes}", *lines)
    say(
        f"schedule   {count(total_steps, 'step')}, {-(-len(train.sampler) // window):,} an epoch; "
        f"{settings.scheduler} from {settings.learning_rate:g}, {settings.warmup_steps} warm-up"
    )
    say(
        f"speed      mfu is the share of this machine's matmul speed, {speed.matmul / 1e12:.3g} "
        f"TFLOP/s, that training uses; a token takes {speed.per_token / 1e9:.3g} GFLOP"
    )
    for warning in _warnings(config, model, train, evaluation, total_steps):
        say(f"warning: {warning}")


def same_rows(train: TokenDataset, evaluation: TokenDataset | None) -> bool:
    """Whether a run is evaluated on the rows that it learns."""
    return evaluation is not None and train.facts.fingerprint == evaluation.facts.fingerprint


def _model_lines(config: Config, model: PreTrainedModel, dtype: torch.dtype) -> Iterator[str]:
    trainable, quantized, total = count_parameters(model)
    weights = "not quantized"
    if config.model.init == "random":
        weights = "random weights"
    elif quantized:
        weights = f"{config.model.quantization} ({quantized / total:.0%} of the weights)"
    yield f"{config.model.name}, {weights}; {trainable:,} of {total:,} weights trained"
    attention, precision = model.config._attn_implementation, str(dtype).removeprefix("torch.")
    yield f"{precision} on {model.device.type}, {attention} attention"
    if config.lora is None:
        yield f"{gib_held(config, dtype, total):.2g} GiB for weights, gradients and moments"
        return
    made: Any = model.peft_config["default"]  # a saved adapter may differ from the config's
    yield f"LoRA r={made.r} alpha={made.lora_alpha} on {', '.join(adapted_names(model))}"
    if config.lora.adapter:
        yield f"continues {config.lora.adapter}, which was made on {made.base_model_name_or_path}"


def _warnings(
    config: Config, model: PreTrainedModel, train: TokenLoader, evaluation: TokenLoader | None,
    total_steps: int,
) -> Iterator[str]:  # fmt: skip
    """Settings that are allowed but rarely intended."""
    rate, warmup = config.training.learning_rate, config.training.warmup_steps
    if config.lora is None and config.model.init == "pretrained" and rate > 1e-4:
        yield f"training.learning_rate={rate:g} suits LoRA; use about 2e-5 to train all weights"
    _, quantized, total = count_parameters(model)
    if 0 < quantized < total / 2:
        bits = config.model.quantization
        yield f"{bits} quantizes only {quantized / total:.0%} of the weights: layers, not experts"
    if config.lora and (experts := ", ".join(frozen_experts(model))):
        yield f"experts get no adapters; lora.target_parameters=[{experts}] adds some"
    known: Any = model.config
    limit = getattr(known.get_text_config(), "max_position_embeddings", None)
    if limit and (longest := int(train.dataset.lengths.max())) > limit:
        yield (
            f"the longest document has {longest:,} tokens, and the model was made for {limit:,} "
            f"positions; data.max_length={limit} keeps within them"
        )
    if warmup > total_steps:
        yield (
            f"training.warmup_steps={warmup} in a run of {count(total_steps, 'step')}: the rate "
            f"ends at {rate * total_steps / warmup:.2g} and never reaches {rate:g}"
        )
    if evaluation and len(evaluation.dataset) < FEW and not config.training.overfit:
        yield (
            f"only {count(len(evaluation.dataset), 'document')} to evaluate on, which choose the "
            "best checkpoint; use more rows for data.eval"
        )


def describe_resume(path: Path | None, state: TrainState, config: Config, total_steps: int) -> None:
    """Print from where a run goes on, and whether its learning rate jumps there.

    The rate follows from the configuration: more epochs stretch a schedule that had ended.
    """
    if path is None:
        return
    settings, saved = config.training, state.learning_rate
    say(f"resume     {path.name} of {path.parent}")
    rate = settings.learning_rate * rate_factor(settings, total_steps, state.step)
    if state.step >= total_steps:
        key = "max_steps" if settings.max_steps == total_steps else "epochs"
        say(f"finished   all {total_steps} steps are done; a larger training.{key} adds more")
    elif state.is_out_of_patience(settings.patience):
        say("finished   stopped early; a larger training.patience, or null, goes on")
    elif saved is not None and not math.isclose(saved, rate, rel_tol=0.01):
        say(
            f"warning: after step {state.step} the learning rate jumps from {saved:.2g} to "
            f"{rate:.2g}: the schedule has changed, and now covers {total_steps} steps. Set "
            "training.learning_rate to fit, or training.scheduler=constant, to avoid the jump"
        )


def show_example(train: TokenLoader, tokenizer: Tokenizer) -> None:
    """Print the first document as the model reads it; tokens with loss are between [ and ]."""
    text = show_document(train.dataset[[0]][0], tokenizer).replace("\n", "\\n")
    say("example    " + (text if len(text) <= 300 else f"{text[:300]} …"))


def measure(
    steps: list[StepResult], state: TrainState, batches: int, speed: Speed, seconds: float
) -> dict[str, Any]:
    """The numbers of a line of `metrics.jsonl`.

    Args:
        steps: since the last line, with their tensors on the CPU.
        state: after the last of them.
        batches: per epoch, over all ranks.
        speed: FLOPs of a token, and FLOP/s of this device.
        seconds: that these steps took.
    """
    tokens, labelled = sum(s.tokens for s in steps), sum(s.labelled for s in steps)
    taken = [step for step in steps if step.taken]
    total = sum(float(step.loss) * step.labelled for step in taken)
    metrics = {
        "step": state.step,
        # `position` also counts the filler of ranks that had no batch left.
        "epoch": round(state.epoch + min(state.position / batches, 1), 4),
        "loss": total / sum(step.labelled for step in taken) if taken else math.nan,
        "learning_rate": steps[-1].learning_rate,
        "grad_norm": float(steps[-1].grad_norm),
        "tokens": state.tokens,
        "tokens_per_second": tokens / seconds,
        "labelled_tokens_per_second": labelled / seconds,
        "mfu": speed.utilisation(tokens, labelled, seconds, distributed.WORLD_SIZE),
        "filler_share": 1 - tokens / sum(s.processed for s in steps),
        "data_wait_share": sum(s.waited for s in steps) / seconds,
        "skipped_steps": state.skipped,
    }
    if peak := torch.cuda.max_memory_allocated():  # 0 where CUDA was not started
        metrics["peak_memory_gib"] = round(peak / GIB, 3)
    return metrics


class Recorder:
    """Writes lines of numbers everywhere: `metrics.jsonl` first, then the terminal and MLflow.

    A context manager around everything that writes into the run's folder. It starts the record and
    the tracker, and in the end writes whether the run finished, failed or was stopped. Processes
    other than the main one write nothing.

    Attributes:
        checkpoints: the folder of the run's checkpoints.
        bar: a progress bar of steps.
    """

    def __init__(
        self, config: Config, written: dict[str, Any], state: TrainState, total_steps: int,
        documents: tuple[TokenDataset, TokenDataset | None],
    ) -> None:  # fmt: skip
        """Prepare; nothing is written yet.

        Args:
            config: of the run.
            written: the same as plain data without secrets.
            state: where the run stands; it is updated in place.
            total_steps: of the whole run.
            documents: to train on, and to evaluate on if there are any.
        """
        self._config, self._written, self._state = config, written, state
        self._total_steps, (self._train, self._eval) = total_steps, documents
        self._record: Record | None = None
        self._tracker: Tracker | None = None
        self._folder = from_root(config.output_dir)
        self.checkpoints = self._folder / "checkpoints"

    def __enter__(self) -> Self:
        self.bar = tqdm(
            total=self._total_steps, initial=self._state.step, unit="step", dynamic_ncols=True,
            disable=None if distributed.is_main() else True,  # None: off where it is no terminal
        )  # fmt: skip
        if distributed.is_main():
            self._record = self._start()
            if self._config.tracking.enabled:
                self._tracker = Tracker(self._record, say)
        return self

    def _start(self) -> Record:
        folder, step = self._folder, self._state.step
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(self._written))
        for name in (METRICS, "samples.jsonl"):
            rewind_metrics(folder / name, step)
        for path in sorted(self.checkpoints.glob(STEPS)):  # damaged, or of steps taken again
            if int(path.name[-8:]) > step:
                path.rename(free_name(path))
        datasets = {"train": self._train} | ({"eval": self._eval} if self._eval else {})
        files = (data.left_out.read_bytes().splitlines(keepends=True) for data in datasets.values())
        if left_out := dict.fromkeys(chain.from_iterable(files)):  # once, if both sets have a row
            (folder / "left_out.jsonl").write_bytes(b"".join(left_out))
        facts = {name: data.facts for name, data in datasets.items()}
        return Record.start(folder, self._written, facts, step)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        status = "FAILED" if kind else "FINISHED"
        if kind and issubclass(kind, Interrupted | KeyboardInterrupt):
            status = "KILLED"
        if self._record:
            self._record.update(status=status, ended=int(time.time() * 1000))
        if self._tracker:
            self._tracker.close(status)

    def log(self, metrics: dict[str, Any]) -> None:
        """Write one line everywhere; keys as in `metrics.jsonl`."""
        if distributed.is_main():
            # A NaN is not JSON, so it is written as null.
            line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
            line["time"] = round(time.time(), 3)
            with (self._folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        say(self._line(metrics))
        if self._tracker:
            self._tracker.wake()

    def _line(self, m: dict[str, Any]) -> str:
        total = self._total_steps
        line = (
            f"step {m['step']:>{len(str(total))}}/{total} · epoch {m['epoch']:.2f} · loss "
            f"{m['loss']:.4f} · lr {m['learning_rate']:.2e} · grad {m['grad_norm']:.2f} · "
            f"{m['tokens_per_second']:,.0f} tok/s · mfu {m['mfu']:.0%}"
        )
        if "peak_memory_gib" in m:
            line += f" · {m['peak_memory_gib']:.1f} GiB"
        if "eval_loss" in m:
            where = " on the training rows" * same_rows(self._train, self._eval)
            line += f" · eval loss{where} {m['eval_loss']:.4f}, perplexity {m['perplexity']:.2f}"
        return line

    def record_result(self, step: int, reason: str) -> None:
        """Write into `config.yaml` of which step the result is."""
        self._result = f"step {step:,} of {self._state.step:,}, {reason}"
        if self._record:
            text = f"# final/ holds {self._result}\n{OmegaConf.to_yaml(self._written)}"
            write_text(self._folder / "config.yaml", text)

    def final_is_written(self, step: int) -> None:
        """Record that `final/` holds the weights of this step."""
        if self._record:
            self._record.update(final=self._result, final_step=step)

    @property
    def final_step(self) -> int:
        """The step of which `final/` is, as far as the record says; 0: it does not."""
        return self._record.facts.get("final_step", 0) if self._record else 0

    def summarise(self) -> None:
        """Print what came out, where it is, and what to do next."""
        here = shlex.quote(self._config.output_dir)
        if rows := read_metrics(self._folder / METRICS):
            last = rows[-1]
            losses = [f"loss {_loss(last['loss'])}"]
            if "eval_loss" in last:
                losses.append(f"evaluation {_loss(last['eval_loss'])}")
            say(f"\ndone       {count(last['step'], 'step')}, {', '.join(losses)}")
            say(f"curve      {here}/loss.png, numbers in metrics.jsonl beside it")
        else:
            say("\ndone       nothing was left to train")
        say(f"model      {here}/final: {self._result}")
        if self._tracker and self._record:
            say(f"runs       {where_to_look(self._record)}")
        # A model that was trained on plain text alone is asked without a chat template.
        only_text = self._train.facts.read_as.keys() == {"text"}
        question = '--raw "a beginning"' if only_text else '"your question"'
        say(f"next       uv run scripts/inference.py {here}/final {question}")


def _loss(value: float | None) -> str:
    """A loss of `metrics.jsonl`, where null stands for NaN and infinity."""
    return "not finite" if value is None else f"{value:.4f}"
