"""Attention in which the documents of a packed row cannot see each other.

transformers masks packed rows for sdpa and eager with a dense (tokens x tokens) matrix; this
function, registered as `varlen`, computes each document alone instead: on CUDA by torch's
variable-length flash attention (no flash-attn package), on a CPU document by document.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from src.utils.errors import UserError


def varlen_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
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
        ValueError: the batch is not packed, as in generation: use sdpa there. Or the CUDA kernel
            would refuse it; so that a CPU shows it, every device is held to that.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "varlen attention reads packed batches only (one row, cu_seq_lens_q given); "
            'for anything else call model.set_attn_implementation("sdpa")'
        )
    if dropout:
        raise ValueError("varlen attention has no dropout; use model.attention=sdpa")
    if torch.is_autocast_enabled(query.device.type):
        # As transformers' flash attention does. Rotary embeddings leave q and k in the dtype of
        # fp32 weights, and autocast casts nothing for a kernel that it does not know.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:  # which a CPU would not mind
        raise ValueError(f"q, k, v are {query.dtype}, {key.dtype}, {value.dtype}: not one dtype")
    if query.is_cuda:
        lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return _attend_on_gpu(query, key, value, lengths, scaling, sliding_window), None
    return _attend_on_cpu(query, key, value, cu_seq_lens_q, scaling, sliding_window), None


def _attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple,
    scaling: float | None, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head_dim)
    # (left, right): torch counts the tokens before this one, transformers counts this one too.
    options: dict[str, Any] = {"window_size": ((sliding_window or 0) - 1, 0), "scale": scaling}
    if "enable_gqa" in inspect.signature(attend).parameters:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:  # torch 2.11
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return attend(q, k, v, *lengths, **options)[None]


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_lens: Tensor,
    scaling: float | None, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    bounds, pieces = cu_seq_lens.tolist(), []
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


def set_attention(
    model: PreTrainedModel, wanted: str, packing: bool, device: torch.device, dtype: torch.dtype
) -> None:
    """Give the model the attention of `model.attention`; `auto`: the first that is right for it.

    Raises:
        UserError: the model does not know it, or would let packed documents see each other.
    """
    if packing and not _isolates_documents(model):
        raise UserError(
            f"data.packing: {model.config.model_type} has layers that carry state from one packed "
            "document into the next; use data.packing=false"
        )
    if wanted == "varlen" and not packing:
        raise UserError("model.attention: varlen reads packed batches; set data.packing=true")
    names = [wanted]
    if wanted == "auto":  # Gemma 2 and gpt-oss, for example, know no sdpa
        best = packing and _varlen_fits(model.config, device, dtype)
        names = ["varlen"] * best + ["sdpa", "eager"]
    for name in names:
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            if name == names[-1]:
                what = f"model.attention: {wanted}: {str(error).splitlines()[0]}"
                raise UserError(what) from None
        else:
            return


def _isolates_documents(model: PreTrainedModel) -> bool:
    """Whether every layer that mixes tokens is attention that the packed row's bounds reach.

    State-space and linear-attention layers carry their state across documents.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return model._supports_attention_backend and kinds <= {"full_attention", "sliding_attention"}


def _varlen_fits(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `varlen` computes what this model's own attention would."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    dropout = getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0)
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = config.model_type.startswith("gpt_oss")
    if device.type == "cuda":  # flash attention: Ampere and later, half precision, not too wide
        ampere = torch.cuda.get_device_capability(device)[0] >= 8
        if not (ampere and dtype != torch.float32 and head_dim <= 256):
            return False
    return not (dropout or softcap or sinks)
