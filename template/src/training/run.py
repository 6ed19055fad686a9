"""A run from its config to a saved model, stage by stage: when it logs, evaluates, saves, stops."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from src.config import Config, TrainingConfig
from src.data.batching import TokenLoader
from src.data.dataset import TokenDataset, load_documents
from src.models.attention import set_attention
from src.models.model import build_model, load_tokenizer, save_model, try_saving
from src.training import report, strategy
from src.training.auto import settle
from src.training.checkpoint import (
    Training,
    TrainState,
    check_identity,
    explain_failed_write,
    find_checkpoint,
    identify,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from src.training.fit import check_feasible, choose_strategy, explain_out_of_memory
from src.training.loss import find_plain_head
from src.training.metrics import draw_curves
from src.training.optimizer import (
    count_steps,
    dtype_of_trained,
    make_optimizer,
    make_scaler,
    make_scheduler,
)
from src.training.samples import check_overfit, make_sampler
from src.training.signals import StopSignal
from src.training.speed import measure_speed
from src.training.tracking import Tracker
from src.training.trainer import StepResult, evaluate, training_steps
from src.utils import distributed
from src.utils.device import pick_device, pick_dtype
from src.utils.environment import from_root
from src.utils.files import RECIPE, free_name, new_folder, only_run_in
from src.utils.ranks import RANK, WORLD_SIZE
from src.utils.seed import set_seed


def run(config: Config, written: dict[str, Any], command: list[str]) -> Path:
    """Train as configured; return the folder of the saved model.

    Args:
        config: validated, and checked by `src.preflight.check_run`.
        written: the same as plain data without secrets, for `config.yaml` and the tracker.
        command: the command line's arguments, to print how to resume.

    Raises:
        UserError: bad input that only the libraries could find.
        RunError: the run cannot go on; its last checkpoint is whole.
        Interrupted: after a signal, with the state saved.
    """
    set_seed(config.seed, config.deterministic)
    device = distributed.own_device(pick_device(config.device))
    dtype, settings = pick_dtype(config.model.dtype, device), config.training
    output, final = from_root(config.output_dir), from_root(config.output_dir) / "final"
    with distributed.process_group(device, settings.timeout), only_run_in(output):
        shared, why = choose_strategy(config, device, dtype)
        if shared:
            report.say(f"strategy   {shared}: {why}")
        check_feasible(config, device, dtype, strategy.shards(shared))
        tokenizer = load_tokenizer(config.model)
        documents = load_documents(config, tokenizer)
        objective, packing = _load_objective(config, tokenizer, shared, device, dtype)
        model = strategy.unwrapped(objective).model
        loaders = train, evaluation = _make_loaders(documents, config, tokenizer, packing)
        distributed.on_main(try_saving, model, tokenizer)
        optimizer, scaler = make_optimizer(model, settings), make_scaler(device, dtype)
        training = Training(model, optimizer, scaler, identify(config, train.dataset.facts))
        total_steps = count_steps(settings, len(train.sampler))
        resumed_at = _resume(training, config, output, total_steps)
        speed = measure_speed(model, train.dataset.lengths, device, dtype)
        report.describe(config, model, dtype, train, evaluation, total_steps, speed)
        report.show_example(train, tokenizer)
        tracker = Tracker(report.say) if config.tracking.enabled else None
        state = training.state
        recorder = report.Recorder(config, written, state, total_steps, speed, loaders, tracker)
        # From here on there is something to lose: a signal now waits for the end of a step.
        with StopSignal(command) as stop, recorder, explain_out_of_memory(config, training):
            settle(config, objective, training, packing, total_steps - resumed_at, dtype)
            sample = make_sampler(objective, tokenizer, config, training.state, dtype)
            _train(objective, training, train, evaluation, config, recorder, stop, sample)
            _take_best(training, recorder)
            weights = strategy.gathered(model)
            distributed.on_main(_save_final, training, weights, tokenizer, dtype, final, resumed_at)
        if settings.overfit:
            strategy.within(objective, check_overfit, config, tokenizer, dtype)
        report.summarise(config, recorder.result, set(train.dataset.facts.read_as) == {"text"})
    return final


def _load_objective(
    config: Config, tokenizer: Tokenizer, shared: str, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, bool]:
    """The model and its loss, shared among the processes; and whether its rows can be packed."""
    build = partial(
        build_model, config.model, config.lora, tokenizer,
        dtype=dtype, trained_in=dtype_of_trained(config.training, dtype),
    )  # fmt: skip
    objective = strategy.distribute(build, shared, device, dtype)
    kind = config.model.attention
    packing = strategy.within(objective, set_attention, kind, config.data.packing, device, dtype)
    bare = strategy.unwrapped(objective)
    bare.head = strategy.within(objective, find_plain_head, device, dtype)
    return objective, packing


def _train(
    objective: nn.Module, training: Training, train: TokenLoader, evaluation: TokenLoader | None,
    config: Config, recorder: report.Recorder, stop: StopSignal, sample: Callable[[], None],
) -> None:  # fmt: skip
    """Train to the last step, to early stopping or to a signal: every *when* of a run is here."""
    state, settings, device = training.state, config.training, training.model.device
    dtype, total_steps = pick_dtype(config.model.dtype, device), recorder.total_steps
    if state.step >= total_steps or state.is_out_of_patience(settings.patience):
        return
    for step in _steps_of_all_epochs(objective, training, train, settings, total_steps, dtype):
        state.count(step.microbatches * WORLD_SIZE, step.tokens)
        recorder.add(step)
        done, best = state.step >= total_steps, False
        stopping = stop.requested() and not done
        evaluating = evaluation and not stopping and (done or _due(settings.eval_every, state))
        saving = stopping or done or _due(settings.save_every, state)
        if not (evaluating or saving or _due(settings.log_every, state)):
            continue
        steps = recorder.take_steps()  # waits for the GPU
        report.check_finite(steps, state, settings.on_non_finite)
        metrics = recorder.measure(steps, train.sampler.batches)
        if evaluating:
            result = evaluate(objective, evaluation, device, dtype)
            metrics |= {"eval_loss": result.loss, "perplexity": result.perplexity}
            best = state.is_best(result.loss)
            done = done or state.is_out_of_patience(settings.patience)
        recorder.log(metrics)  # before saving: a checkpoint's metrics.jsonl has every line up to it
        if evaluating:
            sample()
        if ((saving or done) and settings.save_every is not None) or (best and not done):
            save_checkpoint(training, recorder.checkpoints, settings.keep_checkpoints)
        if stopping:
            saved = settings.save_every is not None
            raise stop.interruption(state.step, total_steps, saved)
        if done:
            return
        recorder.clear()


def _steps_of_all_epochs(
    objective: nn.Module, training: Training, train: TokenLoader, settings: TrainingConfig,
    total_steps: int, dtype: torch.dtype,
) -> Iterator[StepResult]:  # fmt: skip
    """Steps without end, epoch after epoch, from where the run stands."""
    state, optimizer = training.state, training.optimizer
    scheduler = make_scheduler(optimizer, settings, total_steps, state.step)
    while True:
        train.sampler.epoch, train.sampler.position = state.epoch, state.position
        yield from training_steps(
            objective, train, optimizer, training.scaler, training.model.device, dtype=dtype,
            accumulation=settings.gradient_accumulation_steps, scheduler=scheduler,
            max_grad_norm=settings.max_grad_norm,
            skip_non_finite=settings.on_non_finite == "skip",
        )  # fmt: skip
        state.epoch, state.position = state.epoch + 1, 0


def _due(every: int | None, state: TrainState) -> bool:
    return every is not None and state.step % every == 0


def _make_loaders(
    documents: tuple[TokenDataset, TokenDataset | None], config: Config, tokenizer: Tokenizer,
    packing: bool,
) -> tuple[TokenLoader, TokenLoader | None]:  # fmt: skip
    """Batches of both, in memory that a GPU copies from without being waited for."""
    pinned = torch.cuda.is_available() and config.device != "cpu"
    pad_id = tokenizer.pad_token_id
    make = partial(TokenLoader, config=config, pad_id=pad_id, packing=packing, pin_memory=pinned)
    train, evaluation = documents
    return make(train, shuffle=True), make(evaluation, shuffle=False) if evaluation else None


def _resume(training: Training, config: Config, output: Path, total_steps: int) -> int:
    """Load the checkpoint that `training.resume` means; return the step to go on from."""
    if RANK:  # the weights are the same on all; dropout must not be
        set_seed(config.seed + RANK, config.deterministic)
    wanted = config.training.resume
    path, warnings = distributed.from_main(find_checkpoint, wanted, output / "checkpoints")
    for warning in warnings:
        report.say(f"warning: {warning}")
    if path is None:
        return 0
    if not config.training.resume_despite_changes:
        check_identity(path, training.identity)
    load_checkpoint(training, path)
    report.describe_resume(path, training.state, config, total_steps)
    return training.state.step


def _take_best(training: Training, recorder: report.Recorder) -> None:
    """Put the best evaluated weights back for the result; the last ones are in a checkpoint."""
    state, best = training.state, training.state.best_step
    held, why = state.step, "the last step"
    if best is not None:
        path, why = recorder.checkpoints / f"step-{best:08d}", "the best evaluation"
        if best != state.step and distributed.from_main(path.exists):
            load_weights(training.trained(), path)
            held = best
        elif best != state.step:
            why = f"the last step, as the checkpoint of the best one, {best}, is gone"
    recorder.conclude(held, why)


def _save_final(
    training: Training, state: dict[str, Tensor], tokenizer: Tokenizer, dtype: torch.dtype,
    final: Path, resumed_at: int,
) -> None:  # fmt: skip
    if final.exists() and resumed_at == training.state.step:
        return  # nothing was left to train, so nothing has changed
    if final.exists():  # a finished run that goes on: its first result stays too
        final.rename(free_name(final.with_name(f"final-step-{resumed_at:08d}")))
    with explain_failed_write(final, final.with_name("checkpoints")), new_folder(final) as folder:
        save_model(training.model, tokenizer, folder, dtype, state)
        shutil.copy(final.with_name("config.yaml"), folder / RECIPE)
    draw_curves([final.parent], final.with_name("loss.png"))
