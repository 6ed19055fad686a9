"""What to say when memory runs out: what took it, and which settings to try next."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from src.config import Config, changed
from src.training.checkpoint import Training
from src.training.strategy import local
from src.utils.device import cudnn_advice
from src.utils.errors import RunError
from src.utils.memory import GIB, gpu_memory


@contextmanager
def explain_out_of_memory(config: Config, training: Training) -> Generator[None]:
    """Say which parts took how many GiB, and three changes in the order in which to try them.

    Nothing is retried with other settings: that would silently train something else.

    Raises:
        RunError: instead of torch.OutOfMemoryError, and of cuDNN's where it is too old.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        weights = sum(local(p).nbytes for p in training.model.parameters()) / GIB
        kept = [*training.trained().values(), *training.moments()]
        others = sum(local(t).nbytes for t in kept) / GIB
        memory = gpu_memory()
        peak = f"; peak {memory['peak']:.1f} of {memory['total']:.1f} GiB" if memory else ""
        if memory and config.model.gradient_checkpointing == "auto":  # it has done what it can
            config = changed(config, "model.gradient_checkpointing=true")
        changes = [f"{keys} ({now})" for keys, now in next_settings(config)[:3]]
        changes += ["a smaller model, or a GPU with more memory"] * (len(changes) < 3)
        advice = "; ".join(f"({n}) {change}" for n, change in enumerate(changes, 1))
        raise RunError(
            f"out of memory: weights {weights:.1f} GiB, gradients and optimizer {others:.1f} GiB, "
            f"the rest activations of {config.training.batch_size} x {config.data.max_length} "
            f"tokens{peak}. Try, in this order: {advice}"
        ) from None
    except RuntimeError as error:
        if advice := cudnn_advice(error):
            raise RunError(advice) from None
        raise


def next_settings(config: Config) -> list[tuple[str, str]]:
    """Changes that save memory, the one that costs the least first: keys, and what they are now."""
    model, training, full = config.model, config.training, config.lora is None
    size, window = training.batch_size, training.gradient_accumulation_steps
    length = config.data.max_length
    changes = []
    if model.gradient_checkpointing is not True:
        now = str(model.gradient_checkpointing).lower()
        changes.append(("model.gradient_checkpointing=true", f"now {now}; a quarter slower"))
    elif size == 1 and not model.gradient_checkpointing_offload:
        changes.append(("model.gradient_checkpointing_offload=true", "now false; slower"))
    if full and training.optimizer == "adamw":
        changes.append(("training.optimizer=adamw8bit", "now adamw"))
    if size > 1:
        fewer = f"training.batch_size={size // 2} training.gradient_accumulation_steps={2 * window}"
        changes.append((fewer, f"now {size} and {window}; the same steps"))
    if full and model.init == "pretrained":
        changes.append(("lora.r=16", "adapters instead of all weights; now lora=null"))
    if not full and model.quantization != "4bit":
        changes.append(("model.quantization=4bit", f"now {model.quantization}"))
    if length >= 16:
        changes.append((f"data.max_length={length // 2}", f"now {length}; longer rows are cut"))
    return changes
