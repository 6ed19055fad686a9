"""Attention in which the documents of a packed row cannot see each other.

transformers masks packed rows for sdpa and eager with a dense (tokens x tokens) matrix; this
function, registered as `varlen`, computes each document alone instead: on CUDA by torch's
variable-length flash attention (no flash-attn package), on a CPU document by document.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed row.

    Args:
        module: the attention layer; unused, part of transformers' interface.
        query: shape (1, heads, tokens, head_dim).
        key: shape (1, key_value_heads, tokens, head_dim).
        value: as `key`.
        attention_mask: must be None; transformers makes none for a registered function.
        scaling: factor of the scores; None: 1 / sqrt(head_dim).
        dropout: must be 0; the CUDA kernel has none.
        sliding_window: how many tokens a token sees, itself included; None: all before it.
        cu_seq_lens_q: int32, where documents begin, then the number of tokens.
        max_length_q: the longest document.

    Returns:
        Shape (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        ValueError: the batch is not packed, as in generation: use sdpa there.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "varlen attention reads packed batches only (one row, cu_seq_lens_q given); "
            'for anything else call model.set_attn_implementation("sdpa")'
        )
    if dropout:
        raise ValueError("varlen attention has no dropout; use model.attention=sdpa")
    attend = _attend_on_gpu if query.is_cuda else _attend_on_cpu
    out = attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return out, None


def _attend_on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head_dim)
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    # (left, right): torch counts the tokens before this one, transformers counts this one too.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out: Any = varlen_attn(
        *(q, k, v, cu_seq_lens, cu_seq_lens, max_length, max_length),
        scale=scaling,
        window_size=window,
        **options,
    )
    return out[None]


def _attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_length: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    bounds = cu_seq_lens.tolist()
    pieces = []
    for start, end in pairwise(bounds):
        if start == end:
            continue
        # Rounded up, so that few shapes occur: oneDNN compiles a bf16 kernel for each and keeps
        # it, 50 MB a step. No real token sees the zeros to its right.
        length = -(-(end - start) // 64) * 64
        filler = (0, 0, 0, length - (end - start))
        q, k, v = (F.pad(x[:, :, start:end], filler) for x in (query, key, value))
        mask = None
        if sliding_window is not None and length > sliding_window:
            ones = torch.ones(length, length, dtype=torch.bool)
            mask = ones.tril() & ones.triu(1 - sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        pieces.append(out[:, :, : end - start])
    return torch.cat(pieces, dim=2).transpose(1, 2)


# No mask function is registered with it: transformers then makes no mask at all, and makes no
# synchronising test on position_ids either.
AttentionInterface.register("varlen", varlen_attention)


def isolates_documents(model: PreTrainedModel) -> bool:
    """Whether every layer that mixes tokens is attention that the packed row's bounds reach.

    State-space and linear-attention layers carry their state across documents.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return model._supports_attention_backend and kinds <= {"full_attention", "sliding_attention"}


def varlen_fits(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen` computes what this model's own attention would."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    dropout = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = config.model_type.startswith("gpt_oss")
    kernel = device.type == "cpu" or (dtype != torch.float32 and head_dim <= 256)
    return kernel and not (dropout or softcap or sinks)
