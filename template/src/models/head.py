"""The layer that computes the logits, and whether it is a plain one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.data.batching import short_row
from src.models.adapters import base_of
from src.models.attention import probe

CHUNK = 1024  # rows of logits at a time: 0.5 GiB in fp32 with a vocabulary of 128k
CPU_CHUNK = 128  # on a CPU, whose cache holds them: 20 % more tokens a second


def head_of(model: Any) -> Any:
    """The layer that computes the logits, or None.

    If the head is in `lora.modules_to_save`, that is PEFT's copy, or the original while adapters
    are disabled.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "modules_to_save"):
        return head
    return head.original_module if head.disable_adapters else head.modules_to_save["default"]


class PlainHead(NamedTuple):
    """A model whose logits are its backbone's last hidden state times one weight."""

    backbone: nn.Module
    linear: nn.Linear
    chunk: int = CHUNK  # rows of logits at a time
    # `chunk_loss_and_grad` of src/training/loss.py, compiled; None: as it is
    loss_and_grad: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@torch.no_grad()
def find_plain_head(model: nn.Module, dtype: torch.dtype) -> PlainHead | None:
    """The model's backbone and head, if the head is nothing but a linear layer without bias.

    Some models scale or cap their logits (Gemma 2, Granite, Cohere), scale the head's input, or
    adapt the head. No list of names is kept: a hook watches the head on eight tokens. The head's
    input must be the backbone's last hidden state. The hook replaces the head's output by a ramp
    beyond any cap; if the model's logits differ from the ramp, something follows the head.
    """
    base = base_of(model)
    head = head_of(base)
    backbone = getattr(base, "base_model", base)
    if type(head) is not nn.Linear or head.bias is not None or backbone is base:
        return None
    row, seen = short_row(0), {}
    if base.config._attn_implementation != "varlen":  # linear attention refuses a packed row
        row = {"input_ids": row["input_ids"]}

    def watch(_: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        ramp = torch.linspace(-1000, 1000, logits.numel(), device=logits.device, dtype=logits.dtype)
        seen.update(hidden=arguments[0], ramp=ramp.view_as(logits))
        return seen["ramp"]

    with head.register_forward_hook(watch):
        logits = probe(base, row, dtype).logits
    hidden = probe(backbone, row, dtype).last_hidden_state.float()
    if not seen:  # the model computes its logits without calling its head
        return None
    same = (hidden - seen["hidden"].float()).norm() <= 0.01 * hidden.norm()
    if not same or not torch.equal(logits.float(), seen["ramp"].float()):
        return None
    return PlainHead(backbone, head, CPU_CHUNK if base.device.type == "cpu" else CHUNK)
