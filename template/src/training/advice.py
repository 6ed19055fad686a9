"""What to say when memory runs out: what took it, and which settings to try next."""

from __future__ import annotations

import torch
from torch import nn

from src.config import Config
from src.utils.memory import GIB, gpu_memory


def explain_out_of_memory(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer
) -> str:
    """The parts of the memory in GiB, then three changes in the order in which to try them.

    Nothing is retried with other settings: that would silently train something else.
    """
    weights = sum(p.nbytes for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [v for s in optimizer.state.values() for v in s.values()]
    training = sum(p.nbytes for p in trained)
    training += sum(v.nbytes for v in moments if isinstance(v, torch.Tensor))
    parts = (
        f"weights {weights / GIB:.1f} GiB, gradients and optimizer {training / GIB:.1f} GiB, "
        f"the rest activations of {config.training.batch_size} x {config.data.max_length} tokens"
    )
    if memory := gpu_memory():
        parts += f"; peak {memory['peak']:.1f} of {memory['total']:.1f} GiB"
    advice = "; ".join(
        f"({number}) {change}" for number, change in enumerate(next_settings(config)[:3], 1)
    )
    return f"out of memory: {parts}. Try, in this order: {advice}"


def next_settings(config: Config) -> list[str]:
    """Changes that save memory, the one that costs the least first, with today's values."""
    model, training = config.model, config.training
    changes = []
    if not model.gradient_checkpointing:
        changes.append("model.gradient_checkpointing=true (now false; a fifth slower)")
    elif model.every_n_layers > 1:
        changes.append(f"model.every_n_layers=1 (now {model.every_n_layers})")
    if config.lora is None and training.optimizer == "adamw":
        changes.append("training.optimizer=adamw8bit (now adamw)")
    if training.batch_size > 1:
        half, twice = training.batch_size // 2, 2 * training.gradient_accumulation_steps
        changes.append(
            f"training.batch_size={half} training.gradient_accumulation_steps={twice} (now "
            f"{training.batch_size} and {training.gradient_accumulation_steps}; the same steps)"
        )
    if config.lora is None and model.init == "pretrained":
        changes.append("lora.r=16: adapters instead of all weights (now lora=null)")
    elif config.lora is not None and model.quantization != "4bit":
        changes.append(f"model.quantization=4bit (now {model.quantization})")
    changes.append(
        f"data.max_length={config.data.max_length // 2} (now {config.data.max_length}; longer rows "
        "are cut)"
    )
    changes.append("a smaller model, or a GPU with more memory")
    return changes
