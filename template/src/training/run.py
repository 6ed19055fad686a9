"""One run from its config to a saved model; the stages in the order in which they happen."""

from __future__ import annotations

import os
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from src.config import Config
from src.data import IGNORE
from src.data.batching import TokenBudgetSampler, make_loader
from src.data.dataset import TokenDataset, load_tokens
from src.data.rows import read_rows
from src.models.generation import generate
from src.models.model import (
    count_parameters,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    save_model,
)
from src.training import distributed
from src.training.advice import explain_out_of_memory
from src.training.checkpoint import (
    Training,
    TrainState,
    check_identity,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
)
from src.training.fit import Fit
from src.training.optimizer import make_optimizer, make_scheduler
from src.training.recorder import Recorder, plot_loss, read_metrics, rewind_metrics
from src.training.signals import StopSignal
from src.training.speed import Speed, measure_speed
from src.training.tracking import Tracker, tracking_uri
from src.utils.environment import from_root
from src.utils.errors import Interrupted, RunError, UserError
from src.utils.files import new_folder, write_text
from src.utils.seed import set_seed


def run(config: Config, plain: dict[str, Any], command: list[str]) -> Path:
    """Train as configured and save the model.

    Args:
        config: validated, and checked by `src.preflight.check_run`.
        plain: the same as plain data without secrets, for `config.yaml` and the tracker.
        command: the command line's arguments, to print how to resume.

    Returns:
        The folder of the final model.

    Raises:
        UserError: bad input that only the libraries could find.
        Interrupted: after a signal, with the state saved.
    """
    device = pick_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", distributed.LOCAL_RANK)
    output = from_root(config.output_dir)
    with distributed.process_group(device), _only_run_in(output):
        return _Run(config, plain, command, device, output).run()


@dataclass
class _Source:
    """Rows to train or evaluate on, and how they are walked."""

    loader: DataLoader
    sampler: TokenBudgetSampler
    data: TokenDataset


class _Run:
    def __init__(
        self, config: Config, plain: dict[str, Any], command: list[str], device: torch.device,
        output: Path,
    ) -> None:  # fmt: skip
        self.config, self.plain, self.command = config, plain, command
        self.device, self.output = device, output
        self.dtype = pick_dtype(config.model.dtype, device)
        self.checkpoints = output / "checkpoints"

    def run(self) -> Path:
        config = self.config
        transformers_logging.disable_progress_bar()
        set_seed(config.seed, config.deterministic)
        tokenizer = load_tokenizer(config.model)
        train = self._load(config.data.train, tokenizer, shuffle=True)
        # What is overfitted is what must be learnt: evaluate on it too.
        other = config.data.train if config.training.overfit else config.data.eval
        evaluation = self._load(other, tokenizer, shuffle=False) if other else None
        model = load_model(
            config.model, config.lora, tokenizer, self.device, self.dtype, config.data.packing
        )
        total_steps = self._total_steps(train.sampler)
        training = self._training(model, total_steps)
        identity = self._identity(train.data)
        self._resume(training, identity)
        resumed_at = training.state.step
        if resumed_at >= total_steps:
            say(f"finished   all {total_steps} steps are done; a larger training.epochs adds more")
        speed = measure_speed(model, train.data.lengths, self.device, self.dtype)
        self._describe(model, tokenizer, train, evaluation, total_steps, speed)
        # From here on there is something to lose: a signal now waits for the end of a step.
        with StopSignal() as stop:
            self._begin_output(resumed_at)
            fit = Fit(
                training,
                train.loader,
                evaluation.loader if evaluation else None,
                config.training,
                self.device,
                self.dtype,
                total_steps,
                self._recorder(training.state, total_steps),
                self.checkpoints,
                identity,
                stop,
                speed,
            )
            final = self._carry_out(fit, tokenizer, resumed_at)
        self._summary(final)
        if config.training.overfit:
            self._self_test(model, tokenizer)
        return final

    def _carry_out(self, fit: Fit, tokenizer: PreTrainedTokenizerBase, resumed_at: int) -> Path:
        """Train and save; whatever happens, the tracker learns how it ended."""
        status, training = "FAILED", fit.training
        try:
            fit.run()
            final = self._save_final(training.model, tokenizer, resumed_at, training.state.step)
            status = "FINISHED"
            return final
        except torch.OutOfMemoryError:
            message = explain_out_of_memory(self.config, training.model, training.optimizer)
            raise RunError(message) from None
        except Interrupted as stop:
            status = "KILLED"
            raise Interrupted(f"{stop}\nresume: {self._resume_command()}", stop.exit_code) from None
        finally:
            if fit.recorder:
                fit.recorder.close(status)

    def _load(self, source: str, tokenizer: PreTrainedTokenizerBase, shuffle: bool) -> _Source:
        data, training = self.config.data, self.config.training
        dataset = load_tokens(source, tokenizer, data.max_length, training.overfit)
        sampler = TokenBudgetSampler(
            dataset.lengths,
            data.max_length,
            training.batch_size,
            data.packing,
            self.config.seed,
            shuffle,
            distributed.RANK,
            distributed.WORLD_SIZE,
        )
        loader = make_loader(
            dataset,
            sampler,
            tokenizer.pad_token_id,
            data.max_length,
            training.batch_size,
            data.packing,
            data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        return _Source(loader, sampler, dataset)

    def _total_steps(self, sampler: TokenBudgetSampler) -> int:
        settings = self.config.training
        per_epoch = -(-len(sampler) // settings.gradient_accumulation_steps)
        return min(per_epoch * settings.epochs, settings.max_steps or per_epoch * settings.epochs)

    def _training(self, model: PreTrainedModel, total_steps: int) -> Training:
        settings = self.config.training
        optimizer = make_optimizer(model, settings)
        return Training(
            model,
            optimizer,
            make_scheduler(optimizer, settings, total_steps),
            # bf16 has fp32's range: only fp16's gradients need scaling.
            torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16),
            TrainState(),
        )

    def _identity(self, train_data: TokenDataset) -> dict[str, Any]:
        """What a resumed run must share with the one it continues."""
        config = self.config
        return {
            "model.name": config.model.name,
            "model.quantization": config.model.quantization,
            "lora": None if config.lora is None else config.lora.model_dump(),
            "data.train": f"{config.data.train} ({train_data.fingerprint[:12]})",
            "data.max_length": config.data.max_length,
            "data.packing": config.data.packing,
            "training.batch_size": config.training.batch_size,
            "training.gradient_accumulation_steps": config.training.gradient_accumulation_steps,
            "training.optimizer": config.training.optimizer,
            "seed": config.seed,
            "number of processes": distributed.WORLD_SIZE,
        }

    def _resume(self, training: Training, identity: dict[str, Any]) -> None:
        wanted = self.config.training.resume
        if wanted == "never":
            return
        if wanted == "auto":
            path, warnings = newest_checkpoint(self.checkpoints)
            for warning in warnings:
                say(f"warning: {warning}")
            if path is None:
                if warnings:
                    raise UserError(
                        f"training.resume: no checkpoint under {self.checkpoints} is whole; "
                        "training.resume=never with another output_dir starts anew"
                    )
                return
        else:
            path = from_root(wanted)
            if damage := find_damage(path):
                raise UserError(f"training.resume: {wanted}: {damage}")
        if not self.config.training.allow_mismatch:
            check_identity(path, identity)
        load_checkpoint(training, path, self.device)
        say(f"resume     {path.name} of {self.checkpoints}")

    def _describe(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: _Source,
        evaluation: _Source | None,
        total_steps: int,
        speed: Speed,
    ) -> None:
        """The arithmetic of the run, before step 1."""
        config, settings, train = self.config, self.config.training, source.data
        trainable, total = count_parameters(model)
        how = "random weights" if config.model.init == "random" else config.model.quantization
        how = {"none": "not quantized"}.get(how, how)
        kind = "all weights" if config.lora is None else f"LoRA r={config.lora.r}"
        tokens = int(train.lengths.sum())
        real = tokens / (source.sampler.batches * settings.batch_size * config.data.max_length)
        window = (
            f"{settings.batch_size} x {config.data.max_length} tokens x "
            f"{settings.gradient_accumulation_steps} accumulated x {distributed.WORLD_SIZE} "
            f"process{'es' * (distributed.WORLD_SIZE > 1)}"
        )
        fill = f", {real:.1%} of them real" if config.data.packing else ", padded"
        per_epoch = -(-len(source.sampler) // settings.gradient_accumulation_steps)
        say(f"model      {config.model.name}, {how}: {kind} trained, {trainable:,} of {total:,}")
        say(
            f"           {str(self.dtype).removeprefix('torch.')} on {self.device.type}, "
            f"{model.config._attn_implementation} attention"
        )
        say(
            f"data       {len(train):,} rows, {tokens:,} tokens, "
            f"{train.labelled_tokens:,} labelled ({train.labelled_tokens / tokens:.0%})"
            + (f"; {len(evaluation.data):,} rows to evaluate on" if evaluation else "")
        )
        for count, what in (
            (train.truncated, f"cut at data.max_length={config.data.max_length}"),
            (train.dropped, "left out: nothing labelled remains of them"),
        ):
            if count:
                say(f"           {count:,} rows {what}")
        say(f"batch      {window}{fill}")
        say(
            f"schedule   {total_steps:,} steps, {per_epoch:,} an epoch; {settings.scheduler} "
            f"from {settings.learning_rate:g}, {settings.warmup_steps} warm-up"
        )
        say(
            f"speed      {speed.per_token / 1e9:.3g} GFLOP a token; a matmul does "
            f"{speed.matmul / 1e12:.3g} TFLOP/s here, of which mfu is the share in use"
        )
        say(f"example    {_show_labels(train, tokenizer)}")

    def _begin_output(self, step: int) -> None:
        if distributed.is_main():
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(self.output / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(self.plain)))
            rewind_metrics(self.output / "metrics.jsonl", step)

    def _recorder(self, state: TrainState, total_steps: int) -> Recorder | None:
        if not distributed.is_main():
            return None
        tracking, tracker = self.config.tracking, None
        if tracking.enabled:
            name = tracking.run_name or self.output.name
            tracker = Tracker(tracking.experiment, name, self.plain, state.tracking_run, say)
        recorder = Recorder(self.output, tracker, total_steps)
        recorder.advance(state.step)
        return recorder

    def _save_final(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, resumed: int, step: int
    ) -> Path:
        final = self.output / "final"
        if distributed.is_main() and not (final.exists() and resumed == step):
            if final.exists():  # a finished run that goes on: its first result stays too
                final.rename(_free_name(self.output / f"final-step-{resumed:08d}"))
            with new_folder(final) as folder:
                save_model(model, tokenizer, folder, self.dtype)
                config = (self.output / "config.yaml").read_text(encoding="utf-8")
                write_text(folder / "training_config.yaml", config)
            plot_loss(self.output / "metrics.jsonl", self.output / "loss.png")
        distributed.barrier()
        return final

    def _resume_command(self) -> str:
        words = [w for w in self.command if not w.startswith("training.resume=")]
        return shlex.join(["uv", "run", "scripts/train.py", *words, "training.resume=auto"])

    def _summary(self, final: Path) -> None:
        last = read_metrics(self.output / "metrics.jsonl")[-1]
        here = shlex.quote(self.config.output_dir)
        evaluated = f", evaluation {last['eval_loss']:.4f}" if last.get("eval_loss") else ""
        say("")
        say(f"done       {last['step']} steps, loss {last['loss']:.4f}{evaluated}")
        say(f"model      {here}/final")
        say(f"curve      {here}/loss.png, numbers in metrics.jsonl beside it")
        if self.config.tracking.enabled:
            say("runs       uv run mlflow ui --backend-store-uri " + _shown_uri())
        say(f'next       uv run scripts/inference.py {here}/final "your question"')

    def _self_test(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Ask for the first answer that was learnt: mask, template and stop token in one look."""
        messages = next(read_rows(self.config.data.train)).get("messages", [])
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            return  # plain text asks nothing
        at = roles.index("assistant")
        wanted = (messages[at].get("content") or "").strip()
        room = len(tokenizer(wanted)["input_ids"]) + 20  # to run on, if nothing stops it
        answer = generate(model, tokenizer, [messages[:at]], max_length=room)[0]
        if answer == wanted:
            say("overfit    passed: the first row's answer comes back word for word, and ends")
        else:
            raise RunError(
                f"overfit not passed: row 1 says {wanted!r}, the model {answer!r}. If the loss "
                "above is near zero, the template or its stop token is wrong; else train longer"
            )


def _free_name(path: Path) -> Path:
    names = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 1000))]
    return next(name for name in names if not name.exists())


def say(text: str) -> None:
    """Print on the main process only."""
    if distributed.is_main():
        print(text, flush=True)


def _shown_uri() -> str:
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return shlex.quote(tracking_uri()) if not given else '"$MLFLOW_TRACKING_URI"'


def _show_labels(dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first document as the model sees it, what carries loss between [ and ]."""
    ids, labels = dataset.documents([0])[0]
    pairs = zip(ids.tolist(), (labels != IGNORE).tolist(), strict=True)
    shown = ""
    for labelled, run_of in groupby(pairs, key=lambda pair: pair[1]):
        text = str(tokenizer.decode([token for token, _ in run_of]))
        shown += f"[{text}]" if labelled else text
    shown = shown.replace("\n", "\\n")
    return shown if len(shown) <= 300 else f"{shown[:300]} …"


@contextmanager
def _only_run_in(output: Path) -> Generator[None]:
    """Hold the output folder: a second run in it would write into the first one's files."""
    if not distributed.is_main():
        yield
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, not in it: nothing is written inside before all checks are done.
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"output_dir: another run is writing to {output}; wait for it or choose another"
        ) from None
    try:
        yield
    finally:
        lock.release()
