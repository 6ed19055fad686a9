"""Does a run fit its machine? Before it, refuse it or share it among GPUs; after it, advise.

Before weights are fetched only what is held is known: weights, gradients and moments. `plan.py`
counts activations too.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from src.config import Config
from src.models.model import check_positions, count_before_loading
from src.training.optimizer import MOMENTS, dtype_of_trained
from src.utils.distributed import on_main
from src.utils.errors import RunError, UserError, first_line
from src.utils.files import FULL
from src.utils.memory import GIB
from src.utils.ranks import LOCAL_WORLD_SIZE, WORLD_SIZE

MAX_ON_A_CPU = 2e9  # parameters; above, a step takes minutes and an epoch weeks
ROOM = 0.7  # share of a GPU's memory for what is held, so that activations have the rest


def gib_held(config: Config, dtype: torch.dtype) -> float:
    """GiB of weights, gradients and moments of a model that is not quantized.

    Full fine-tuning in fp32 has a half-precision copy of each weight too, made by autocast.

    Args:
        config: says what is trained, and by which optimizer.
        dtype: dtype of matmuls.
    """
    count = count_before_loading(config.model)
    if config.lora:
        return count * dtype.itemsize / GIB
    kept = dtype_of_trained(config.training, dtype)
    copy = dtype.itemsize if kept != dtype else 0
    return count * (2 * kept.itemsize + MOMENTS[config.training.optimizer] + copy) / GIB


def may_shard(config: Config) -> bool:
    """Whether `training.strategy=auto` may shard the model: quantized weights are not sharded."""
    return config.model.quantization == "none" and config.training.optimizer == "adamw"


def choose_shards(config: Config, device: torch.device, dtype: torch.dtype) -> int:
    """The number of shards of the model, by `training.strategy`; 1: each process has a copy.

    Prints the strategy and its reason where there are several processes.

    Raises:
        UserError: FSDP is asked for, together with fp16.
    """
    strategy = config.training.strategy
    if WORLD_SIZE == 1:
        return 1
    if strategy in {"fsdp", "hsdp"} and dtype == torch.float16:
        raise UserError(
            f"training.strategy: {strategy} trains in bf16 or fp32, as fp16's scaler would judge "
            "each shard alone; use ddp"
        )
    if strategy != "auto":
        reason = "as training.strategy says"
    elif not may_shard(config) or device.type == "cpu" or dtype == torch.float16:
        strategy, reason = "ddp", "what is quantized, in fp16, or on a CPU is not sharded"
    else:
        held = gib_held(config, dtype)
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        strategy = "fsdp" if held > ROOM * total else "ddp"
        reason = f"{held:.0f} GiB of weights, gradients and moments, a GPU has {total:.0f}"
    on_main(print, f"strategy   {strategy}: {reason}")
    return {"fsdp": WORLD_SIZE, "hsdp": LOCAL_WORLD_SIZE}.get(strategy, 1)


def check_feasible(config: Config, device: torch.device, dtype: torch.dtype, shards: int) -> None:
    """Check the model's positions, and its size against a CPU's speed or GPUs' memory.

    Raises:
        UserError: with the figures, and what would work.
    """
    check_positions(config.model, config.data.max_length)
    name = config.model.name
    if device.type == "cpu" and config.device == "auto":
        count = count_before_loading(config.model)
        if count > MAX_ON_A_CPU:
            raise UserError(
                f"device: no GPU here, and {name} has {count / 1e9:.1f} billion parameters: each "
                "step would take minutes on this CPU. Use a GPU or a smaller model, or set "
                "device=cpu to train on the CPU nevertheless"
            )
    if device.type == "cuda" and config.lora is None:
        needed = gib_held(config, dtype) / shards
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        if needed > total:
            raise UserError(
                f"lora=null: the weights of {name}, their gradients and moments take "
                f"{needed:.0f} GiB a GPU, and this one has {total:.0f}: try "
                "training.optimizer=adamw8bit, more GPUs with training.strategy=fsdp, lora.r=16, "
                "or a smaller model"
            )


@contextmanager
def explain_failures(config: Config) -> Generator[None]:
    """Say in a line why a run has no memory, or cannot write or read its folder, and what to do.

    For memory: the peak, and three changes in the order in which to try them. Nothing is retried
    with other settings: that would silently train something else.

    Raises:
        RunError: instead of torch.OutOfMemoryError, of cuDNN's error where it is too old for
            packed attention, and of what the operating system and the libraries raise where a
            disk is full or fails.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated() / GIB
        changes = [*next_settings(config), "a smaller model, or a GPU with more memory"]
        advice = "; ".join(f"({n}) {change}" for n, change in enumerate(changes[:3], 1))
        raise RunError(
            f"out of memory: a microbatch of {config.training.batch_size} x "
            f"{config.data.max_length} tokens; peak {peak:.1f} GiB. Try, in this order: {advice}"
        ) from None
    except RuntimeError as error:
        if "cuDNN Frontend error" not in str(error):
            raise
        advice = "remove yours from LD_LIBRARY_PATH, so that torch loads its own"
        raise RunError(f"attention: {first_line(error)}: {advice}") from None
    except (OSError, SafetensorError, CheckpointException) as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        # DCP wraps the errors of all processes.
        cause = next((cause for cause, _ in getattr(error, "failures", {}).values()), error)
        raise RunError(
            f"{config.output_dir}: could not be written or read: {first_line(cause)}; checkpoints "
            "that are there are whole: make room, then go on with training.resume=auto"
        ) from error


def next_settings(config: Config) -> list[str]:
    """Changes that save memory, as keys for a command line; the one that costs the least first."""
    model, training, full = config.model, config.training, config.lora is None
    size, steps = training.batch_size, training.gradient_accumulation_steps
    # `auto` has recomputed every layer by then.
    length, recomputes = config.data.max_length, model.gradient_checkpointing is not False
    offload = recomputes and size == 1 and not model.gradient_checkpointing_offload
    fewer = f"training.batch_size={size // 2} training.gradient_accumulation_steps={2 * steps}"
    changes = {
        "model.gradient_checkpointing=true": not recomputes,
        "model.gradient_checkpointing_offload=true": offload,
        "training.optimizer=adamw8bit": full and training.optimizer == "adamw",
        fewer: size > 1,
        "lora.r=16": full and model.init == "pretrained",
        "model.quantization=4bit": not full and model.quantization != "4bit",
        f"data.max_length={length // 2}": length >= 16,
    }
    return [keys for keys, applies in changes.items() if applies]
