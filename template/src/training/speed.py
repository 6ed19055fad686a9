"""How fast a step is against what this device can do: model FLOPs over a matmul measured here."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from src.models.head import head_of


@dataclass
class Speed:
    """The arithmetic that real tokens need, and the rate at which this device multiplies.

    Attributes:
        per_token: FLOPs of a real token's forward and backward pass, the head left out.
        per_label: FLOPs of the head for a labelled token; the others do not go through it.
        matmul: FLOP/s of a large matrix product on this device, in the run's dtype.
    """

    per_token: float
    per_label: float
    matmul: float

    def utilisation(self, tokens: int, labelled: int, seconds: float, devices: int) -> float:
        """Model FLOPs utilisation: what was needed over what could have been done, 0 to 1.

        Filler and recomputed activations count as time, not as work.
        """
        needed = self.per_token * tokens + self.per_label * labelled
        return needed / (seconds * self.matmul * devices)


def count_flops(model: nn.Module, lengths: np.ndarray) -> tuple[float, float]:
    """Count the model's matrix products: for a token, and in the head for a labelled one.

    A weight costs 2 FLOPs forward and 2 for its input's gradient; 2 more for its own gradient
    only if it trains. So LoRA needs 4N + 3a + 6 N_lora a token and full fine-tuning 6N + 3a,
    where a is causal attention forward. Counting 6N for LoRA too, as is common, overstates
    the utilisation by half.

    Args:
        model: with or without adapters, quantized or not.
        lengths: tokens of each document; attention costs more in longer ones.
    """
    config: Any = model.config
    config, head = config.get_text_config(), head_of(model)
    linears = [
        m
        for name, m in model.named_modules()
        # PEFT keeps the original of a module whose copy is trained.
        if isinstance(m, nn.Linear) and m is not head and "original_module" not in name
    ]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Two products (scores, values) of 2 FLOPs, half of the square, averaged over all tokens.
    attended = (lengths.astype(float) ** 2).sum() / lengths.sum() / 2
    heads = config.num_hidden_layers * config.num_attention_heads * head_dim
    return sum(map(_flops, linears)) + 3 * 4 * heads * attended, _flops(head)


def _flops(linear: nn.Linear) -> float:
    # Not weight.numel(): a 4-bit weight holds two values a byte.
    return (6 if linear.weight.requires_grad else 4) * linear.in_features * linear.out_features


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device, measured in well under a second."""
    # Half precision is emulated by many CPUs: a small product takes them long enough.
    size, rounds = (768, 5) if dtype == torch.float32 else (384, 2)
    if device.type == "cuda":
        size, rounds = 8192, 10
    # Random, as zeros draw less power and multiply faster.
    a = torch.randn(size, size, device=device).to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for count in (2, rounds):  # first to warm up
        wait()
        started = time.perf_counter()
        for _ in range(count):
            a @ a
    wait()
    return 2 * size**3 * rounds / (time.perf_counter() - started)
