"""Attention in which the documents of a packed row cannot see each other.

transformers masks packed rows for sdpa and eager with a dense (tokens x tokens) matrix. This
function, registered as `varlen`, computes each document alone instead: on CUDA by torch's
variable-length flash attention (no flash-attn package), on a CPU document by document.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from src.data.batching import MODEL_INPUTS, short_row, to_device
from src.utils.device import autocast
from src.utils.errors import UserError

HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0, softcap: float | None = None, s_aux: Tensor | None = None,
    kernel: Callable[..., Tensor] | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each document of a packed row.

    Args:
        module: the attention layer; unused, part of transformers' interface.
        query: shape (1, heads, tokens, head_dim).
        key: shape (1, key_value_heads, tokens, head_dim).
        value: as `key`.
        attention_mask: unused; transformers makes none for a registered function.
        scaling: factor of the scores; None: 1 / sqrt(head_dim).
        dropout: must be 0, as the CUDA kernel has none.
        sliding_window: how many tokens a token sees, itself included; None: all before it.
        cu_seq_lens_q: int32, where documents begin, then the number of tokens.
        max_length_q: the longest document.
        softcap: a cap on the scores (Gemma 2): must be None.
        s_aux: attention sinks (gpt-oss): must be None.
        kernel: what computes it; None: the CUDA kernel on a GPU, else a loop over documents.

    Returns:
        Shape (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        ValueError: the batch is not packed, as in generation, or no CUDA kernel supports the
            model, which is refused on every device.
    """
    packed = cu_seq_lens_q is not None and len(query) == 1 and query.shape[2] == key.shape[2]
    width = query.shape[-1]
    one_width = width == key.shape[-1] == value.shape[-1] and width % 8 == 0 and width <= 256
    if not (packed and one_width) or dropout or softcap or s_aux is not None:
        raise ValueError(
            "varlen attention reads packed batches only (one row, cu_seq_lens_q given); it has no "
            "dropout, no cap on scores and no sinks, and one head dimension, a multiple of 8 up to "
            f"256 (here {width}). Else: model.set_attn_implementation('sdpa')"
        )
    if torch.is_autocast_enabled(query.device.type):
        # As transformers' flash attention does. Rotary embeddings leave q and k in the dtype of
        # fp32 weights, and autocast does not cast the inputs of a kernel that it does not know.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kernel = kernel or (attend_by_kernel if query.is_cuda else _attend_by_document)
    return kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


def attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int,
    scaling: float | None, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """Attention by torch, which picks cuDNN or flash attention for the GPU."""
    attend: Any = varlen_attn
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (tokens, heads, head_dim)
    # (left, right): torch counts the tokens before this one, transformers counts this one too.
    options: dict[str, Any] = {"window_size": ((sliding_window or 0) - 1, 0), "scale": scaling}
    if HAS_GQA:
        options["enable_gqa"] = True
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return attend(q, k, v, bounds, bounds, longest, longest, **options)[None]


def _attend_by_document(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int,
    scaling: float | None, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    pieces = []
    for start, end in pairwise(bounds.tolist()):
        if start == end:
            continue
        # Rounded up, so that few shapes occur: oneDNN compiles a bf16 kernel for each and keeps
        # it, 50 MB a step. No real token attends to the zeros on its right.
        length = -(-(end - start) // 64) * 64
        filler = (0, 0, 0, length - (end - start))
        q, k, v = (F.pad(x[:, :, start:end], filler) for x in (query, key, value))
        mask = None
        if sliding_window and length > sliding_window:
            ones = torch.ones(length, length, dtype=torch.bool)
            mask = ones.tril() & ones.triu(1 - sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        pieces.append(out[:, :, : end - start])
    return torch.cat(pieces, dim=2).transpose(1, 2)


# No mask function is registered with it: transformers then makes no mask at all, and does not
# test position_ids, which would synchronise with the host.
AttentionInterface.register("varlen", varlen_attention)


def set_attention(
    model: PreTrainedModel, implementation: str, packing: bool, dtype: torch.dtype
) -> bool:
    """Set `model.attention`; for `auto`, the first implementation that is right for the model.

    With `packing` that is one which keeps documents apart, if the model has any.

    Returns:
        Whether rows may be packed: `packing`, and the model keeps documents apart.

    Raises:
        UserError: the model does not support it, or `varlen` would compute something else.
    """
    names, reason, device = [implementation], "", model.device
    if implementation == "auto":  # Gemma 2 and gpt-oss, for example, have no sdpa
        names = ["varlen"] * packing + ["sdpa", "eager"]
    generation = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    for name in names:
        try:
            model.set_attn_implementation(name)
            if name == "varlen":
                if generation < 8 or (device.type == "cuda" and dtype == torch.float32):
                    raise ValueError("flash attention needs bf16 or fp16, and an Ampere GPU")
                # Head dimensions, dropout, caps and sinks are judged by what a layer passes, not
                # by the names that each family's configuration has for them.
                probe(model, short_row(0), dtype, training=True)
        except (ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
            continue
        packs = packing and _isolates_documents(model, dtype)
        if packs or name != "varlen":
            return packs
        reason = "reads packed documents only, and this model cannot keep them apart"
    raise UserError(f"model.attention: {implementation}: {reason}")


def _isolates_documents(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether a packed document's logits are the same whatever document stands before it.

    State-space and linear-attention layers carry their state along the row, and some models make
    their masks without looking at positions (gpt-oss in transformers 5.23). So it is tested rather
    than looked up. Only chunked attention is refused by name: chunks are counted along the whole
    row, and are too long for a short row to show it.
    """
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return False
    try:
        one, other = (
            probe(model, short_row(first, 0), dtype).logits[0, 8:].float() for first in (0, 8)
        )
    except ValueError:  # linear attention, where a kernel's package is missing, says so itself
        return False
    # Not equal: a mixture of experts adds up in another order for other neighbours.
    return bool(((one - other).norm(dim=-1) <= 0.01 * one.norm(dim=-1)).all())


@torch.no_grad()
def probe(model: Any, row: dict[str, Any], dtype: torch.dtype, training: bool = False) -> Any:
    """Return what a model makes of a short row; its mode and the run's random numbers stay.

    It runs eagerly, or compiled layers would specialise on eight tokens first.
    """
    before, device = model.training, model.device
    model.train(training)
    try:
        with (
            torch.random.fork_rng([device] * (device.type == "cuda")),  # for dropout
            torch.compiler.set_stance("force_eager"),
            autocast(device, dtype),
        ):
            return model(**to_device(row, device, MODEL_INPUTS), use_cache=False)
    finally:
        model.train(before)
