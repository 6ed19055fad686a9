"""Refuse a run that cannot work on this device, before its weights are fetched."""

import torch

from src.config import Config
from src.models.model import check_positions, count_before_loading
from src.training.optimizer import bytes_a_weight
from src.training.speed import matmul_rate
from src.utils.errors import UserError
from src.utils.memory import GIB

MAX_ON_A_CPU = 2e9  # parameters; above, a step takes minutes and an epoch weeks


def gib_held(config: Config, dtype: torch.dtype) -> float:
    """GiB of weights, gradients and moments of a model that is not quantized."""
    each = dtype.itemsize if config.lora else bytes_a_weight(config.training, dtype)
    return count_before_loading(config.model) * each / GIB


def check_feasible(config: Config, device: torch.device, dtype: torch.dtype, shards: int) -> None:
    """Check the model's positions, and its size against a CPU's speed or GPUs' memory.

    Raises:
        UserError: with the figures, and what would work.
    """
    check_positions(config.model, config.data.max_length)
    training, name = config.training, config.model.name
    if device.type == "cpu" and config.device == "auto":
        count = count_before_loading(config.model)
        tokens = training.batch_size * config.data.max_length * training.gradient_accumulation_steps
        if count > MAX_ON_A_CPU:
            minutes = 4 * count * tokens / matmul_rate(device, dtype) / 60
            raise UserError(
                f"device: no GPU here, and {name} has {count / 1e9:.1f} billion parameters: a step "
                f"would take about {minutes:,.0f} minutes on this CPU. Use a GPU or a smaller "
                "model, or say device=cpu to do it all the same"
            )
    if device.type == "cuda" and config.lora is None:
        needed = gib_held(config, dtype) / shards
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        if needed > total:
            less = "training.optimizer=adamw8bit, " * (training.optimizer == "adamw")
            raise UserError(
                f"lora=null: the weights of {name}, their gradients and moments take "
                f"{needed:.0f} GiB a GPU, and this one has {total:.0f}: try {less}more GPUs with "
                "training.strategy=fsdp, lora.r=16, or a smaller model"
            )
