"""Attention in which the documents of a packed row cannot see each other.

transformers masks packed rows for sdpa and eager with a dense (tokens x tokens) matrix; this
function, registered as `varlen`, computes each document alone instead: on CUDA by torch's
variable-length flash attention (no flash-attn package), on a CPU document by document.
"""

import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from src.data.batching import MODEL_INPUTS, short_row, to_device
from src.utils.device import autocast, cudnn_advice
from src.utils.errors import UserError

HALF = {torch.bfloat16, torch.float16}
HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # not in torch 2.11


def varlen_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0, softcap: float | None = None, s_aux: Tensor | None = None,
    kernel: Callable[..., Tensor] | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each document of a packed row.

    A CPU would compute much that the CUDA kernels refuse. So their contract holds on every
    device, but for fp32, which CPUs train in and which is never given to `varlen` on a GPU.

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
        softcap: a cap on the scores (Gemma 2): must be None.
        s_aux: attention sinks (gpt-oss): must be None.
        kernel: what computes it; None: the CUDA kernel on a GPU, else a loop over documents.

    Returns:
        Shape (1, tokens, heads, head_dim), and None for the weights.

    Raises:
        ValueError: the batch is not packed, as in generation: use sdpa there. Or the contract is
            broken: one half-precision dtype for q, k and v, one head dimension, a multiple of 8
            up to 256, int32 bounds, a positive scale, one device.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            "varlen attention reads packed batches only (one row, cu_seq_lens_q given); "
            'for anything else call model.set_attn_implementation("sdpa")'
        )
    if dropout or softcap or s_aux is not None:
        raise ValueError("varlen attention has no dropout, no cap on scores and no sinks")
    if torch.is_autocast_enabled(query.device.type):
        # As transformers' flash attention does. Rotary embeddings leave q and k in the dtype of
        # fp32 weights, and autocast casts nothing for a kernel that it does not know.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _check_contract(query, key, value, cu_seq_lens_q, scaling, sliding_window)
    kernel = kernel or (attend_by_kernel if query.is_cuda else _attend_by_document)
    return kernel(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None


def _check_contract(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None,
    sliding_window: int | None,
) -> None:  # fmt: skip
    dtypes, width = (query.dtype, key.dtype, value.dtype), query.shape[-1]
    if not dtypes[0] == dtypes[1] == dtypes[2]:
        raise ValueError(f"varlen attention: q, k, v are {dtypes}, not of one dtype")
    if dtypes[0] not in HALF and (query.is_cuda or dtypes[0] != torch.float32):
        raise ValueError(f"varlen attention: {dtypes[0]} is not half precision")
    if not width == key.shape[-1] == value.shape[-1] or width % 8 or width > 256:
        widths = (width, key.shape[-1], value.shape[-1])
        raise ValueError(
            f"varlen attention: head dimensions {widths}, not one multiple of 8 <= 256"
        )
    if key.shape != value.shape or query.shape[1] % key.shape[1]:
        raise ValueError("varlen attention: query heads are no multiple of key and value heads")
    if bounds.dtype != torch.int32 or not bounds.is_contiguous():
        raise ValueError(f"varlen attention: cu_seq_lens of {bounds.dtype}, not of int32 in a row")
    if not query.device == key.device == value.device == bounds.device:
        raise ValueError("varlen attention: q, k, v and cu_seq_lens are not on one device")
    if scaling is not None and not scaling > 0:
        raise ValueError(f"varlen attention: a scale of {scaling} is not above 0")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"varlen attention: a window of {sliding_window} tokens")


def attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int,
    scaling: float | None, sliding_window: int | None,
) -> Tensor:  # fmt: skip
    """Attend by torch: on cuDNN or flash attention, as it finds right for the GPU."""
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
# The GPU's way on any device, for a plan on tensors without data.
AttentionInterface.register("varlen_kernel", partial(varlen_attention, kernel=attend_by_kernel))


def set_attention(
    model: PreTrainedModel, wanted: str, packing: bool, device: torch.device, dtype: torch.dtype
) -> None:
    """Give the model the attention of `model.attention`; `auto`: the first that is right for it.

    With `packing` that is one which keeps documents apart, if the model has any: see
    `isolates_documents`.

    Raises:
        UserError: the model does not know it, or `varlen` would compute something else, or a
            library on this machine is too old for it.
    """
    names, usable, reason = [wanted], [], ""
    if wanted == "auto":  # Gemma 2 and gpt-oss, for example, know no sdpa
        names = ["varlen"] * packing + ["sdpa", "eager"]
    for name in names:
        try:
            model.set_attn_implementation(name)
            if name == "varlen":
                _try_varlen(model, device, dtype)
        except (ValueError, ImportError) as error:
            reason = str(error).splitlines()[0]
        except RuntimeError as error:
            if advice := cudnn_advice(error):
                raise UserError(advice) from None
            raise
        else:
            if packing and isolates_documents(model, device, dtype):
                return
            reason = "reads packed documents only, and this model cannot keep them apart"
            usable += [name] * (name != "varlen")
    if not usable:
        raise UserError(f"model.attention: {wanted}: {reason}")
    model.set_attn_implementation(usable[0])


@torch.no_grad()
def isolates_documents(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a packed document's logits are the same whatever document stands before it.

    State-space and linear-attention layers carry their state along the row, and some models make
    their masks without looking at positions (gpt-oss in transformers 5.23). So it is tried rather
    than looked up. Only attention in chunks is refused by name: they are counted along the whole
    row, and are too long for a short one to show.
    """
    if "chunked_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return False
    training, logits = model.training, []
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), autocast(device, dtype):
            for first in (0, 8):
                row = to_device(short_row(first, 0), device, MODEL_INPUTS)
                logits.append(model(**row, use_cache=False).logits[0, 8:].float())  # the second's
    except ValueError:  # linear attention, where a kernel's package is missing, says so itself
        return False
    finally:
        model.train(training)
    one, other = logits
    # Not equal: a mixture of experts adds up in another order for other neighbours.
    return bool(((one - other).norm(dim=-1) <= 0.01 * one.norm(dim=-1)).all())


@torch.no_grad()
def _try_varlen(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Let the model read one short document by `varlen`, in training mode.

    Head dimensions, dropout, caps and sinks are then judged by what a layer asks for, rather
    than by the names that each family's configuration has for them.

    Raises:
        ValueError: the GPU, the dtype or one of the layers is not for it.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        raise ValueError("flash attention needs a GPU of the Ampere generation or later")
    training, row = model.training, to_device(short_row(0), device, MODEL_INPUTS)
    model.train()
    try:
        # Other dropout may draw random numbers, which the run's must not depend on.
        with torch.random.fork_rng([device] * (device.type == "cuda")), autocast(device, dtype):
            model(**row, use_cache=False)
    finally:
        model.train(training)
