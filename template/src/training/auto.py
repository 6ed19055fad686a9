"""Settle what `auto` leaves open on this machine: compiled layers, and layers that are recomputed.

Both are decided by trying microbatches of made-up tokens before step 1. They are full and wholly
labelled, so no later microbatch takes more memory. Neither decision changes what is trained.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from src.config import Config
from src.data.batching import full_batch, to_device
from src.models.adapters import without_input_casts
from src.models.model import checkpoint_layers, compile_layers, decoder_layers, recompute_first
from src.training import strategy
from src.training.checkpoint import Training
from src.training.loss import chunk_gradient
from src.training.optimizer import MOMENTS
from src.training.report import say
from src.utils.device import autocast
from src.utils.distributed import WORLD_SIZE, gather, on_main
from src.utils.errors import first_line
from src.utils.memory import GIB, clear_memory, gpu_memory, print_gpu_memory

COMPILING = 25.0  # seconds that compiling takes, once; 13 to 22 were measured on an H200
SAVED = 0.2  # of a step's time, by compiled layers; 0.21 was measured there
TRIES = 5  # counts of recomputed layers: two or three where layers are alike
MARGIN = 0.94  # of the memory is planned with: fragments take some of the rest


@dataclass
class Trial:
    """What a full microbatch took; the most of all processes."""

    held: float  # GiB allocated when the backward pass began
    peak: float  # GiB allocated at most
    seconds: float


def settle(
    config: Config, objective: nn.Module, training: Training, packing: bool, steps: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Compile the layers, and recompute some of them, as the config says or as it pays off.

    Args:
        config: whose `model.compile` and `model.gradient_checkpointing` may be `auto`.
        objective: the model with its loss, attention and head set.
        training: the same model, with its optimizer.
        packing: whether rows are packed: all microbatches have one shape then.
        steps: that are left to take.
        dtype: that matmuls run in.

    Raises:
        torch.OutOfMemoryError: a microbatch does not fit, with every layer recomputed.
    """
    model, device = training.model, training.model.device
    layers, recomputed, peak = len(decoder_layers(model)), 0, 0.0
    fitting = config.model.gradient_checkpointing == "auto" and _can_recompute(model)
    undecided = config.model.compile == "auto" and packing and _may_compile(config, model)
    compiling = config.model.compile is True
    if device.type == "cuda":
        clear_memory()
        on_main(print_gpu_memory, "memory    ")  # what loading left
    if steps == 0 or not (fitting or undecided or compiling):
        return
    attempt = partial(try_microbatches, objective, training, _full(config, packing, device), dtype)
    recompute, to_come = partial(recompute_first, model), gib_of_moments_to_come(config, training)
    limit = MARGIN * memory_limit(device) - to_come
    if fitting:
        checkpoint_layers(model, config.model)
    if undecided:
        attempt()  # it loads the kernels
        seconds = attempt().seconds * config.training.gradient_accumulation_steps * steps
        compiling = worth_compiling(seconds)
    if fitting:
        recomputed, peak = choose_layers(attempt, recompute, layers, limit)
    if compiling:
        if recomputed:  # so that both kinds of layers are compiled, and surely fit
            recompute(max(layers - 1, recomputed))
        compile_all(objective, attempt)
        if recomputed:  # compiled layers take less
            recomputed, peak = choose_layers(attempt, recompute, layers, limit)
    if fitting:
        figures = f"at most {peak + to_come:.1f} of {memory_limit(device):.1f} GiB"
        say(f"memory     {recomputed} of {layers} layers recomputed: {figures}")
    clear_memory()  # the peak that is logged is then that of training


def _can_recompute(model: Any) -> bool:
    """Whether layers can be recomputed one by one: not every architecture supports it."""
    layers = decoder_layers(model)
    supported = model.supports_gradient_checkpointing and len(layers) > 0
    each = all(hasattr(layer, "gradient_checkpointing") for layer in layers)
    return model.device.type == "cuda" and supported and each


def _may_compile(config: Config, model: Any) -> bool:
    """Whether compiled layers are known to be faster here.

    bitsandbytes' 8-bit matmul asks the host in every layer, and was never measured compiled. A
    deterministic run that is resumed must compute as before, whatever is left of it.
    """
    known = config.model.quantization != "8bit" and not config.deterministic
    return model.device.type == "cuda" and known and len(decoder_layers(model)) > 0


def _full(config: Config, packing: bool, device: torch.device) -> list[dict[str, Any]]:
    """A step's microbatches; two where gradients are accumulated, so that one finds some."""
    batch = full_batch(config.training.batch_size, config.data.max_length, packing)
    return [to_device(batch, device)] * min(config.training.gradient_accumulation_steps, 2)


def worth_compiling(seconds: float) -> bool:
    """Whether compiled layers earn back their compile time in a run of so many seconds."""
    worth = SAVED * seconds > COMPILING
    run = f"{seconds / 60:,.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
    verdict = "yes" if worth else "no"
    cost = f"compiling {COMPILING:.0f} seconds once"
    say(f"compile    {verdict}: training takes {run} without it, {cost}")
    return worth


def compile_all(objective: nn.Module, attempt: Callable[[], Trial]) -> None:
    """Compile the layers and the loss, and try them; if they fail, run eagerly from here on.

    There may be no C compiler or no Triton, or Dynamo or Inductor cannot take this architecture,
    perhaps in the backward pass only.
    """
    bare = strategy.unwrapped(objective)
    compile_layers(bare.model)
    if bare.head is not None:
        bare.head = bare.head._replace(gradient=torch.compile(chunk_gradient))
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
    """The fewest layers that must be recomputed to stay within a limit, and GiB at the peak then.

    Measures what one layer keeps where that surely fits, and then tries the count that follows.

    Args:
        attempt: takes a full microbatch.
        recompute: sets how many layers are recomputed.
        layers: how many there are.
        limit: GiB that may be allocated.
    """
    recompute(layers)
    every = attempt()
    recompute(layers - 1)
    one_less = _try_to_fit(attempt, limit)
    fits, peak, fails = layers, every.peak, -1  # counts of recomputed layers
    if one_less is not None:
        each = max(one_less.held - every.held, 1e-6)
        for _ in range(TRIES):
            count = max(fits - int((limit - peak) / each), 0)
            if count <= fails:  # the estimate was wrong
                count = (fits + fails + 1) // 2
            if count >= fits:
                break
            recompute(count)
            if (trial := _try_to_fit(attempt, limit)) is not None:
                fits, peak = count, trial.peak
            else:
                fails = count
    recompute(fits)
    return fits, peak


def _try_to_fit(attempt: Callable[[], Trial], limit: float) -> Trial | None:
    try:
        trial = attempt()
    except torch.OutOfMemoryError:
        if WORLD_SIZE > 1:  # the other processes wait in a collective operation
            raise
        return None
    return trial if trial.peak <= limit else None


def try_microbatches(
    objective: nn.Module, training: Training, window: list[dict[str, Any]], dtype: torch.dtype
) -> Trial:
    """Forward and backward pass of each microbatch, without a step; random states stay."""
    device, held, peak, seconds = training.model.device, 0.0, 0.0, 0.0
    on_gpu = device.type == "cuda"
    clear_memory()
    try:
        with (
            torch.random.fork_rng([device] if on_gpu else []),
            without_input_casts(training.model),
        ):
            for batch in window:
                started = time.perf_counter()
                with autocast(device, dtype):
                    loss = objective(batch)
                held = gpu_memory(device)["allocated"] if on_gpu else 0.0
                loss.backward()
                loss.item()  # waits for the GPU
                seconds = time.perf_counter() - started
        peak = gpu_memory(device)["peak"] if on_gpu else 0.0
    finally:
        training.optimizer.zero_grad(set_to_none=True)
    return Trial(*(max(values) for values in zip(*gather((held, peak, seconds)), strict=True)))


def memory_limit(device: torch.device) -> float:
    """GiB that this process may allocate; the least of all processes."""
    if device.type != "cuda":
        return float("inf")
    memory = gpu_memory(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return min(gather(min(memory["free"] + memory["reserved"], share * memory["total"])))


def gib_of_moments_to_come(config: Config, training: Training) -> float:
    """GiB that the optimizer allocates in its first step."""
    trained = sum(strategy.local(p).numel() for p in training.trained().values())
    there = sum(strategy.local(t).nbytes for t in training.moments())
    return max(trained * MOMENTS[config.training.optimizer] - there, 0) / GIB
