"""Decide what `auto` leaves open: whether layers are compiled, and how many are recomputed.

Both are decided before step 1, by microbatches of made-up tokens that are full and wholly labelled:
no later microbatch takes more memory. Recomputing changes no result; compiled layers round
differently.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from src.data.batching import full_batch, to_device
from src.models.model import checkpoint_layers, compile_layers, decoder_layers, recompute_first
from src.training import strategy
from src.training.checkpoint import Run, trained_weights
from src.training.loss import chunk_loss_and_grad
from src.training.optimizer import MOMENTS
from src.training.report import say
from src.utils.distributed import WORLD_SIZE, gather, on_main
from src.utils.errors import first_line
from src.utils.memory import GIB, clear_memory, gpu_memory, print_gpu_memory

COMPILE_SECONDS = 25.0  # once; 13 to 22 were measured on an H200
SAVED = 0.2  # share of a step's time that compiled layers save; 0.21 was measured there
MARGIN = 0.94  # share of the memory to plan with: fragmentation takes some of the rest


@dataclass
class Trial:
    """What full microbatches took; the maximum of all processes."""

    held: float  # GiB allocated when the backward pass began
    peak: float  # GiB
    seconds: float  # of the last microbatch


def prepare_layers(run: Run) -> None:
    """Compile the layers, and recompute some of them, as the config says; `auto` measures.

    Raises:
        torch.OutOfMemoryError: a full microbatch does not fit.
    """
    config, model, steps_left = run.config, run.model, run.total_steps - run.state.step
    accumulation = config.training.gradient_accumulation_steps
    if model.device.type == "cuda":
        clear_memory()
        on_main(print_gpu_memory, "memory    ", model.device)  # after loading
    fitting, undecided = what_auto_decides(run)
    compiling = config.model.compile is True
    if steps_left <= 0 or not (fitting or undecided or compiling):
        return
    batch = full_batch(config.training.batch_size, config.data.max_length, run.train_loader.packing)
    batches = [to_device(batch, model.device)] * min(accumulation, 2)
    attempt = partial(try_microbatches, run, batches)
    if fitting:
        checkpoint_layers(model, config.model)
    if undecided:
        attempt()  # loads the kernels
        compiling = _is_worth_compiling(attempt().seconds * accumulation * steps_left)
    if not fitting:
        if compiling:
            compile_all(run, attempt)
        clear_memory()
        return
    layers, total = len(decoder_layers(model)), memory_limit(model.device)
    moments = _gib_of_missing_moments(run)
    recompute = partial(recompute_first, model)
    choose = partial(choose_layers, attempt, recompute, layers, MARGIN * total - moments)
    recomputed, peak = choose()
    if compiling:
        if recomputed:  # so that both kinds of layers are compiled, and surely fit
            recompute(max(layers - 1, recomputed))
        compile_all(run, attempt)
        if recomputed:  # compiled layers take less
            recomputed, peak = choose()
    figures = f"at most {peak + moments:.1f} of {total:.1f} GiB"
    say(f"memory     {recomputed} of {layers} layers recomputed: {figures}")
    clear_memory()  # the peak that is logged is then that of training


def _gib_of_missing_moments(run: Run) -> float:
    """GiB that the optimizer allocates in its first step."""
    if run.optimizer.state:
        return 0.0
    weights = map(strategy.local, trained_weights(run.model).values())
    return sum(p.numel() for p in weights) * MOMENTS[run.config.training.optimizer] / GIB


def what_auto_decides(run: Run) -> tuple[bool, bool]:
    """Whether to choose how many layers are recomputed, and whether they are compiled.

    Not every architecture can recompute layers one by one. Compiled layers must be known to be
    faster: bitsandbytes' 8-bit matmul waits for the GPU in every layer, and was never measured
    compiled; padded rows have many shapes. A deterministic run that is resumed must compute as
    before, however many steps are left.
    """
    model, settings, layers = run.model, run.config.model, decoder_layers(run.model)
    on_gpu = model.device.type == "cuda" and bool(layers)
    each = all(hasattr(layer, "gradient_checkpointing") for layer in layers)
    can_recompute = each and model.supports_gradient_checkpointing
    may_compile = run.train_loader.packing and settings.quantization != "8bit"
    return (
        on_gpu and settings.gradient_checkpointing == "auto" and can_recompute,
        on_gpu and settings.compile == "auto" and may_compile and not run.config.deterministic,
    )


def _is_worth_compiling(seconds: float) -> bool:
    """Whether compiling saves more time than it costs in a run of so many seconds."""
    worth = SAVED * seconds > COMPILE_SECONDS
    cost = f"at most {seconds / 60:,.0f} min without it, compiling {COMPILE_SECONDS:.0f} s once"
    say(f"compile    {'yes' if worth else 'no'}: training takes {cost}")
    return worth


def compile_all(run: Run, attempt: Callable[[], Trial]) -> None:
    """Compile the layers and the loss, and try them; if that fails, run eagerly from here on.

    There may be no C compiler or no Triton, or Dynamo or Inductor cannot compile this architecture,
    perhaps in the backward pass only. Processes on unlike machines may not agree on that: then
    those that can compile wait for the others until `training.timeout`.
    """
    compile_layers(run.model)
    objective = strategy.unwrapped(run.objective)
    if objective.head is not None:
        objective.head = objective.head._replace(loss_and_grad=torch.compile(chunk_loss_and_grad))
    started = time.perf_counter()
    try:
        attempt()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - Dynamo, Inductor and Triton raise many types
        torch.compiler.set_stance("force_eager")
        say(f"compile    failed, so nothing is compiled: {first_line(error)}")
    else:
        say(f"compile    done in {time.perf_counter() - started:.0f} seconds")


def choose_layers(
    attempt: Callable[[], Trial], recompute: Callable[[int], None], layers: int, limit: float
) -> tuple[int, float]:
    """Recompute the fewest layers that stay within a limit; their number, and GiB at the peak.

    Recomputing all but one shows what a layer keeps, and so which number to try next; three or
    four trials usually suffice.

    Args:
        attempt: runs full microbatches.
        recompute: sets how many layers are recomputed.
        layers: how many there are.
        limit: GiB that may be allocated.

    Raises:
        torch.OutOfMemoryError: not even with all layers recomputed does a microbatch fit.
    """
    recompute(layers)
    every = attempt()
    fits, fails, peak, per_layer = layers, -1, every.peak, math.inf  # counts; GiB; GiB a layer
    count = layers - 1
    while fails < count < fits:
        recompute(count)
        try:
            trial = attempt()
        except torch.OutOfMemoryError:
            if WORLD_SIZE > 1:  # the other processes wait in a collective operation
                raise
            trial = Trial(0.0, math.inf, 0.0)
        if trial.peak <= limit:
            fits, peak = count, trial.peak
            per_layer = max((trial.held - every.held) / (layers - count), 1e-6)
        else:
            fails = count
        count = max(fits - int((limit - peak) / per_layer), 0)
        if count <= fails:  # the estimate was wrong
            count = (fits + fails + 1) // 2
    recompute(fits)
    return fits, peak


def try_microbatches(run: Run, batches: list[dict[str, Any]]) -> Trial:
    """Forward and backward pass of each microbatch, without a step.

    Given two, the second runs beside gradients, as with accumulation.
    """
    held, seconds = 0.0, 0.0
    clear_memory()
    try:
        for batch in batches:
            started = time.perf_counter()
            loss = run.objective(batch)
            held = torch.cuda.memory_allocated() / GIB  # 0 where CUDA was not started
            loss.backward()
            loss.item()  # waits for the GPU
            seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / GIB
    finally:
        run.optimizer.zero_grad(set_to_none=True)
    return Trial(*map(max, zip(*gather((held, peak, seconds)), strict=True)))


def memory_limit(device: torch.device) -> float:
    """GiB that this process may allocate; the minimum of all processes."""
    memory, share = gpu_memory(device), torch.cuda.get_per_process_memory_fraction(device)
    return min(gather(min(memory["free"] + memory["reserved"], share * memory["total"])))
