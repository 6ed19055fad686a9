"""A run from its config to `final/`: its stages, and when it logs, evaluates, saves and stops."""

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from src.config import Config
from src.data.batching import TokenLoader
from src.data.dataset import load_documents
from src.models.model import load_tokenizer, save_model, try_saving
from src.training import checkpoint, report, strategy
from src.training.auto import prepare_layers
from src.training.checkpoint import Run, save_checkpoint
from src.training.fit import check_feasible, choose_shards, explain_failures
from src.training.optimizer import count_steps, make_optimizer, make_scheduler
from src.training.record import draw_curves, read_record
from src.training.samples import check_overfit, make_sampler
from src.training.signals import StopSignal
from src.training.speed import Speed, count_flops, matmul_rate
from src.training.trainer import StepResult, evaluate, on_cpu, perplexity, training_steps
from src.utils import distributed
from src.utils.device import pick_device, pick_dtype
from src.utils.environment import from_root
from src.utils.errors import RunError, UserError
from src.utils.files import RECIPE, free_name, new_folder, only_run_in
from src.utils.ranks import RANK, WORLD_SIZE
from src.utils.seed import set_seed


def run(config: Config) -> Path:
    """Train as configured; return the folder of the saved model.

    Args:
        config: validated, and checked by `src.preflight.check_run`.

    Raises:
        UserError: bad input that only the libraries could find.
        RunError: the run cannot go on; its last checkpoint is whole.
        Interrupted: after a signal; the state is saved.
    """
    set_seed(config.seed, config.deterministic)
    device, output = pick_device(config.device), from_root(config.output_dir)
    with (
        distributed.process_group(device, config.training.timeout),
        only_run_in(output),
        explain_failures(config),
    ):
        prepared = _prepare(config, device)
        # From here on a signal waits for the end of a step, so that no training is lost.
        with StopSignal() as stop, report.Recorder(prepared) as recorder:
            prepare_layers(prepared)
            sample = make_sampler(prepared, recorder)
            _train(prepared, recorder, stop, sample)
            _save_result(prepared, recorder)
        if config.training.overfit:
            check_overfit(prepared)
        recorder.summarise()
    return output / "final"


def _prepare(config: Config, device: torch.device) -> Run:
    """Make everything that training needs, and describe it; nothing is written to `output_dir`."""
    settings = config.training
    dtype = pick_dtype(config.model.dtype, device)
    shards = choose_shards(config, device, dtype)
    check_feasible(config, device, dtype, shards)
    tokenizer = load_tokenizer(config.model)
    train_documents, eval_documents = load_documents(config, tokenizer)
    objective, packing = strategy.build_objective(config, tokenizer, shards, device, dtype)
    model = strategy.unwrapped(objective).model
    distributed.on_main(try_saving, model, tokenizer)  # fails now, not after training
    make_loader = partial(
        TokenLoader, config=config, pad_id=tokenizer.pad_token_id, packing=packing,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    train_loader, eval_loader = make_loader(train_documents, shuffle=True), None
    if eval_documents is not None:
        eval_loader = make_loader(eval_documents, shuffle=False)
    # The loss is scaled in fp16 only: bf16 has the range of fp32.
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(
        model, make_optimizer(model, settings), scaler,
        checkpoint.identify(config, train_loader.dataset.facts),
        config=config, tokenizer=tokenizer, objective=objective, dtype=dtype,
        train_loader=train_loader, eval_loader=eval_loader,
        total_steps=count_steps(settings, len(train_loader.sampler)),
        speed=Speed(*count_flops(model, train_loader.dataset.lengths), matmul_rate(device, dtype)),
    )  # fmt: skip
    resumed = checkpoint.resume(run)
    if run.state.step > run.total_steps:
        done = f"{run.state.step} steps are done, and this configuration has {run.total_steps}"
        raise UserError(f"training.resume: {done}; to go on, raise training.epochs or max_steps")
    if resumed:
        report.describe_resume(run, resumed)
    elif settings.resume == "auto":
        report.say(f"resume     nothing to go on from in {config.output_dir}: a new run")
    report.describe(run)
    return run


def _train(
    run: Run, recorder: report.Recorder, stop: StopSignal, sample: Callable[[], None]
) -> None:
    """Train until the last step, early stopping or a signal; log, evaluate and save when due."""
    state, settings = run.state, run.config.training
    steps, started = [], time.perf_counter()
    for step in _steps_of_all_epochs(run):
        state.step += 1
        state.position += step.microbatches * WORLD_SIZE
        state.tokens += step.tokens
        steps.append(step)
        recorder.bar.update()
        last, best = state.step >= run.total_steps, False
        stopping = stop.requested() and not last
        evaluating = not stopping and (last or state.is_due(settings.eval_every))
        eval_loader = run.eval_loader if evaluating else None
        saving = stopping or last or state.is_due(settings.save_every)
        if eval_loader is None and not saving and not state.is_due(settings.log_every):
            continue
        steps = on_cpu(steps)  # waits for the GPU
        _count_skipped(run, steps)
        seconds = time.perf_counter() - started
        metrics = report.measure(run, steps, seconds)
        if eval_loader is not None:
            loss = evaluate(run.objective, eval_loader, run.model.device)
            metrics |= {"eval_loss": loss, "perplexity": perplexity(loss)}
            best = state.record_evaluation(loss)
            last = last or state.is_out_of_patience(settings)
        recorder.log(metrics)  # before saving: metrics.jsonl has every line up to a checkpoint
        if eval_loader is not None:
            sample()
        # Save at a signal; if save_every is set, when due and at the end; and at a new best loss,
        # except at the end, where `final/` holds it.
        if stopping or (settings.save_every and (saving or last)) or (best and not last):
            save_checkpoint(run, run.folder / "checkpoints", settings.keep_checkpoints)
        if stopping:
            raise stop.interruption(state.step, run.total_steps)
        if last:
            return
        steps, started = [], time.perf_counter()


def _steps_of_all_epochs(run: Run) -> Iterator[StepResult]:
    """Steps from where the run stands, epoch after epoch, until `_train` ends them."""
    state, settings = run.state, run.config.training
    if state.step >= run.total_steps or state.is_out_of_patience(settings):
        return
    scheduler = make_scheduler(run.optimizer, settings, run.total_steps, state.step)
    sampler = run.train_loader.sampler
    _seed_step(run)
    while True:
        sampler.epoch, sampler.position = state.epoch, state.position
        for step in training_steps(
            run.objective, run.train_loader, run.optimizer, run.scaler, run.model.device,
            accumulation=settings.gradient_accumulation_steps,
            max_grad_norm=settings.max_grad_norm,
            skip_non_finite=settings.on_non_finite == "skip",
        ):  # fmt: skip
            scheduler.step()  # also after a step that was not taken
            yield step
            _seed_step(run)
        state.epoch, state.position = state.epoch + 1, 0


def _seed_step(run: Run) -> None:
    """Seed this process's next step, so that a resumed run draws the same dropout."""
    # Not seed + step: then seed 43 at step 0 would draw what seed 42 draws at step 1.
    mixed = np.random.SeedSequence((run.config.seed, run.state.step, RANK))
    set_seed(int(mixed.generate_state(1)[0]))


def _count_skipped(run: Run, steps: list[StepResult]) -> None:
    """Count the steps that were not taken; with on_non_finite=stop, raise on a non-finite one."""
    state = run.state
    for number, step in enumerate(steps, state.step - len(steps) + 1):
        state.skipped += not step.taken
        if not step.finite and run.config.training.on_non_finite == "stop":
            raise RunError(
                f"step {number}: the loss or a gradient is not finite; the step was not taken. "
                f"This process's batches held documents {step.documents} of the training set, "
                "counted from 0 after rows are left out, held out or split. Lower "
                "training.learning_rate, correct the rows, or set training.on_non_finite=skip to "
                "go on without such steps"
            )


def _save_result(run: Run, recorder: report.Recorder) -> None:
    """Save the weights of the best evaluation as `final/`; without evaluations, the last ones."""
    step, best, reason = run.state.step, run.state.best_step, "the last step"
    if best == step:
        reason = "the best evaluation"
    elif best is not None:
        path = run.folder / "checkpoints" / f"step-{best:08d}"
        if distributed.on_main(checkpoint.find_damage, path) is None:
            checkpoint.load_weights(run.model, path)
            step, reason = best, "the best evaluation"
        else:
            reason = f"the last step, as {path.name}, the best one, is gone or damaged"
    distributed.on_main(_write_final, run, strategy.gathered(run.model), step)
    recorder.record_result(step, reason)


def _write_final(run: Run, weights: dict[str, Tensor], step: int) -> None:
    """Write `final/`, and the curve; keep the result of an earlier step as `final-step-N`."""
    output, final = run.folder, run.folder / "final"
    draw_curves([output], output / "loss.png")
    if final.exists():  # of a finished run that was continued
        held = read_record(output).get("final_step", "unknown")
        if held == step:
            return
        final.rename(free_name(output / f"final-step-{held}"))
    with new_folder(final) as folder:
        save_model(run.model, run.tokenizer, folder, run.dtype, weights)
        shutil.copy(output / "config.yaml", folder / RECIPE)
