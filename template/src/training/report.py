"""What people read of a run: its printed lines, `metrics.jsonl`, curve and summary."""

import json
import math
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.data import IGNORE
from src.data.dataset import Document, TokenDataset
from src.models.adapters import adapted_names, frozen_experts
from src.training.checkpoint import Run
from src.training.optimizer import rate_factor
from src.training.record import drop_lines_after, hide, start_record, update_record
from src.training.tracking import Tracker, where_to_look
from src.training.trainer import StepResult
from src.utils import distributed
from src.utils.errors import Interrupted, UserError
from src.utils.files import METRICS, STEPS, free_name, write_text
from src.utils.memory import GIB


def say(text: str) -> None:
    """Print on the main process only, without tearing its progress bar."""
    if distributed.is_main():
        tqdm.write(text)


def say_lines(name: str, *lines: str) -> None:
    """Print lines as a paragraph with a name."""
    say(f"{name:<11}" + f"\n{'':<11}".join(lines))


def data_lines(dataset: TokenDataset) -> Iterator[str]:
    """Say how large a dataset is, how its rows were read or left out, and what was not read."""
    facts, tokens = dataset.facts, dataset.lengths.sum()
    share = f"of which {facts.labelled_tokens:,} labelled ({facts.labelled_tokens / tokens:.0%})"
    yield f"documents: {len(dataset):,}, tokens: {tokens:,}, {share}"
    yield "read " + ", ".join(f"{count:,} as {shape}" for shape, count in facts.read_as.items())
    for note, count in facts.notes.items():
        yield f"{count:,} {'row' if count == 1 else 'rows'} {note}"
    if facts.unread:
        yield f"not read: {', '.join(facts.unread)}"


def show_document(
    document: Document, tokenizer: Tokenizer, marks: tuple[str, str] = ("[", "]")
) -> str:
    """Return a document as the model sees it, with the tokens that carry loss between marks."""
    pairs = zip(document.input_ids.tolist(), document.labels.tolist(), strict=True)
    text = ""
    for labelled, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        part = str(tokenizer.decode([token for token, _ in group]))
        text += f"{marks[0]}{part}{marks[1]}" if labelled else part
    return text


def describe(run: Run) -> None:
    """Print what is trained, on what, and how: before step 1."""
    config, train, evaluation = run.config, run.train_loader, run.eval_loader
    settings, data, length = config.training, train.dataset, config.data.max_length
    lines = [*data_lines(data)]
    if evaluation:
        same = data.facts.fingerprint == evaluation.dataset.facts.fingerprint
        lines.append(f"to evaluate on: {len(evaluation.dataset):,}{' (the same rows)' * same}")
    say_lines("model", *_model_lines(run))
    say_lines("data", *lines)
    real = data.lengths.sum() / (train.sampler.batches * settings.batch_size * length)
    fill, window = f"{real:.1%} of them real", settings.gradient_accumulation_steps
    say(
        f"batch      {settings.batch_size} x {length} tokens, {fill if train.packing else 'padded'}"
        f"; accumulation {window}, processes {distributed.WORLD_SIZE}"
    )
    say(
        f"schedule   steps: {run.total_steps:,}, an epoch: {-(-len(train.sampler) // window):,}; "
        f"{settings.scheduler} from {settings.learning_rate:g}, warm-up {settings.warmup_steps}"
    )
    for warning in _warnings(run):
        say(f"warning: {warning}")
    # As the model reads it; tokens with loss are between [ and ].
    say(f"example    {show_document(data[[0]][0], run.tokenizer)[:300]!r}")


def _model_lines(run: Run) -> Iterator[str]:
    config, model = run.config, run.model
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    weights = f"{config.model.init}, quantization {config.model.quantization}"
    yield f"{config.model.name}, {weights}; {trained:,} of {total:,} weights trained"
    attention, precision = model.config._attn_implementation, str(run.dtype).removeprefix("torch.")
    yield f"{precision} on {model.device.type}, {attention} attention"
    if config.lora:
        made: Any = model.peft_config["default"]  # a saved adapter may differ from the config's
        yield f"LoRA r={made.r} alpha={made.lora_alpha} on {', '.join(adapted_names(model))}"


def _warnings(run: Run) -> Iterator[str]:
    """Settings that are allowed but rarely intended."""
    config, model, train = run.config, run.model, run.train_loader
    rate = config.training.learning_rate
    if config.data.packing and not train.packing:
        yield f"not packed: {model.config.model_type} would let packed documents see each other"
    if config.lora is None and config.model.init == "pretrained" and rate > 1e-4:
        yield f"training.learning_rate={rate:g} suits LoRA; use about 2e-5 to train all weights"
    if config.lora and (experts := ", ".join(frozen_experts(model))):
        yield f"experts get no adapters; lora.target_parameters=[{experts}] adds them"
    if (warmup := config.training.warmup_steps) > run.total_steps:
        yield f"training.warmup_steps={warmup}: training ends before the rate reaches {rate:g}"
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and (longest := int(train.dataset.lengths.max())) > limit:
        yield f"a document has {longest:,} tokens, but the model has {limit:,} positions"


def describe_resume(run: Run, path: Path) -> None:
    """Print from which checkpoint a run goes on, and whether its learning rate jumps there.

    The rate follows from the configuration: more epochs stretch a schedule that had ended.
    """
    state, settings, saved = run.state, run.config.training, run.state.learning_rate
    say(f"resume     {path.name} of {path.parent}")
    rate = settings.learning_rate * rate_factor(settings, run.total_steps, state.step)
    if state.step >= run.total_steps or state.is_out_of_patience(settings):
        more = "to go on, raise training.epochs, max_steps or patience"
        say(f"finished   nothing is left to train; {more}")
    elif saved is not None and not math.isclose(saved, rate, rel_tol=0.01):
        say(
            f"warning: after step {state.step} the learning rate jumps from {saved:.2g} to "
            f"{rate:.2g}, because the schedule changed: adjust training.learning_rate"
        )


def measure(run: Run, steps: list[StepResult], seconds: float) -> dict[str, Any]:
    """The numbers of a line of `metrics.jsonl`.

    Args:
        run: after the last of these steps.
        steps: since the last line, with their tensors on the CPU.
        seconds: that these steps took.
    """
    state, batches = run.state, run.train_loader.sampler.batches  # of an epoch, over all processes
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
        "mfu": run.speed.utilisation(tokens, labelled, seconds, distributed.WORLD_SIZE),
        "data_wait_share": sum(s.waited for s in steps) / seconds,
        "skipped_steps": state.skipped,
    }
    if peak := torch.cuda.max_memory_allocated():  # 0 where CUDA was not started
        metrics["peak_memory_gib"] = round(peak / GIB, 3)
    return metrics


class Recorder(AbstractContextManager):
    """Writes a run's files and prints its lines; a tracker sends the files to MLflow.

    A context manager around everything that writes into the run's folder. In the end it writes
    whether the run finished, failed or was stopped. Processes other than the main one write
    nothing.

    Attributes:
        bar: a progress bar of steps.
    """

    _tracker: Tracker | None = None

    def __init__(self, run: Run) -> None:
        """Prepare the folder for the run's next steps; start the record and the tracker."""
        self._run = run
        self.bar = tqdm(
            total=run.total_steps, initial=run.state.step, unit="step", dynamic_ncols=True,
            disable=None if distributed.is_main() else True,  # None: off where it is no terminal
        )  # fmt: skip
        if distributed.is_main():
            loaders = {"train": run.train_loader, "eval": run.eval_loader}
            data = {part: loader.dataset for part, loader in loaders.items() if loader is not None}
            self._prepare_folder(data.values())
            tags = {f"fingerprint.{part}": d.facts.fingerprint[:16] for part, d in data.items()}
            start_record(run.folder, run.config.written, tags, run.state.step)
            if run.config.tracking.enabled:
                self._tracker = Tracker(run.folder, say)

    def _prepare_folder(self, data: Iterable[TokenDataset]) -> None:
        """Write the rows left out; drop an earlier run's later lines, rename its checkpoints."""
        folder, step = self._run.folder, self._run.state.step
        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, "samples.jsonl"):
            drop_lines_after(folder / name, step or -1)  # answers before step 1 are made again
        for path in sorted(folder.glob(f"checkpoints/{STEPS}")):  # damaged, or of steps taken again
            if int(path.name[-8:]) > step:
                path.rename(free_name(path))
        lines = "".join(part.left_out.read_text("utf-8") for part in data).splitlines(keepends=True)
        if lines:
            unique = dict.fromkeys(lines)  # once, if both sets have a row
            write_text(folder / "left_out.jsonl", hide("".join(unique)))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        stopped = kind and issubclass(kind, Interrupted | KeyboardInterrupt)
        status = "KILLED" if stopped else "FAILED" if kind else "FINISHED"
        # A record that cannot be updated hides no earlier error.
        with suppress(OSError, UserError) if kind else nullcontext():
            if distributed.is_main():
                update_record(self._run.folder, status=status, ended=int(time.time() * 1000))
            if self._tracker:
                self._tracker.close()

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`, and print it."""
        # NaN and infinity are not JSON: they are written as null.
        line = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self.append(METRICS, line | {"time": round(time.time(), 3)})
        say(_line(metrics, self._run.total_steps))

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line to a file of JSON lines in the run's folder, without secrets."""
        if distributed.is_main():
            with (self._run.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(hide(line), ensure_ascii=False) + "\n")

    def record_result(self, step: int, reason: str) -> None:
        """Record that `final/` holds the weights of this step, and why."""
        self._result = f"step {step:,} of {self._run.state.step:,}, {reason}"
        if distributed.is_main():
            update_record(self._run.folder, final=self._result, final_step=step)

    def summarise(self) -> None:
        """Print where the result is, and what to do next."""
        here = shlex.quote(self._run.config.output_dir)
        say(f"\nmodel      {here}/final: {self._result}")
        say(f"curve      {here}/loss.png, numbers in metrics.jsonl beside it")
        if self._tracker:
            say(f"runs       {where_to_look(self._run.folder)}")
        # A model that was trained on plain text alone is asked without a chat template.
        only_text = self._run.train_loader.dataset.facts.read_as.keys() == {"text"}
        question = '--raw "a beginning"' if only_text else '"your question"'
        say(f"next       uv run scripts/inference.py {here}/final {question}")


def _line(m: dict[str, Any], total_steps: int) -> str:
    line = (
        f"step {m['step']:>{len(str(total_steps))}}/{total_steps} · epoch {m['epoch']:.2f} · loss "
        f"{m['loss']:.4f} · lr {m['learning_rate']:.2e} · grad {m['grad_norm']:.2f} · "
        f"{m['tokens_per_second']:,.0f} tok/s · mfu {m['mfu']:.0%}"
    )
    if "peak_memory_gib" in m:
        line += f" · {m['peak_memory_gib']:.1f} GiB"
    if "eval_loss" in m:
        line += f" · eval loss {m['eval_loss']:.4f}, perplexity {m['perplexity']:.2f}"
    return line
