"""Documents of a packed row do not see each other, whatever the attention."""

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import packed
from src.data.batching import MODEL_INPUTS
from src.models import attention
from src.models.attention import set_attention, varlen_attention
from src.training.trainer import train_epoch
from src.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "training", "checkpointing"),
    [
        ("varlen", True, True),
        ("varlen", False, False),
        ("sdpa", True, True),
        ("eager", False, True),
    ],
)
def test_packed_documents_equal_separate_ones(
    make_model, data, kind, training, checkpointing
) -> None:
    model = make_model(attention=kind, gradient_checkpointing=checkpointing).train(training)
    alone = make_model(attention="sdpa", packing=False)
    row = packed(data, [3, 1, 4, 0])
    logits = model(**{k: row[k] for k in MODEL_INPUTS if k in row}, use_cache=False).logits[0]
    at = 0
    for _, ids, _ in data[[3, 1, 4, 0]]:
        expected = alone(torch.tensor(ids)[None].long()).logits[0]
        assert torch.allclose(logits[at : at + len(ids)], expected, atol=1e-5)
        at += len(ids)


def test_a_sliding_window_ends_in_its_own_document() -> None:
    torch.manual_seed(0)
    bounds, window = [0, 5, 70, 100], 16
    q, k, v = torch.randn(3, 1, 4, 100, 8)
    found, _ = varlen_attention(
        torch.nn.Identity(), q, k, v, None, sliding_window=window, max_length_q=65,
        cu_seq_lens_q=torch.tensor([*bounds, 100], dtype=torch.int32),
    )  # fmt: skip
    document = torch.bucketize(torch.arange(100), torch.tensor(bounds), right=True)
    near = torch.ones(100, 100, dtype=torch.bool).tril().triu(1 - window)
    mask = near & (document[:, None] == document)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"lora": True}, {"lora": True, "quantization": "4bit"}])
def test_what_reaches_the_kernel_is_what_the_cuda_kernel_accepts(
    make_model, data, options, monkeypatch
) -> None:
    # With fp32 weights, rotary embeddings make q and k fp32 and leave v in bf16: a CUDA kernel
    # refuses that, sdpa on a CPU does not mind. pytest -m gpu runs the kernel itself.
    calls, attend = [], attention._attend_by_document
    monkeypatch.setattr(
        attention, "_attend_by_document", lambda *args: calls.append(args) or attend(*args)
    )
    model = make_model(dtype=torch.bfloat16, **options)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    train_epoch(model, [packed(data, [0, 1])], optimizer, None, CPU, dtype=torch.bfloat16)
    assert calls
    for q, k, v, bounds, longest, scale, window in calls:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert k.shape == v.shape
        assert q.shape[1] % k.shape[1] == 0
        assert bounds.dtype == torch.int32
        assert bounds.is_contiguous()
        assert longest >= bounds.diff().max()
        assert scale > 0
        assert window is None


def test_varlen_is_refused_where_it_would_compute_something_else() -> None:
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=1, n_head=2, n_positions=128)
    model = GPT2LMHeadModel(config)  # has dropout in its attention
    with pytest.raises(UserError, match=r"model.attention: varlen: .* no dropout"):
        set_attention(model, "varlen", True, torch.float32)
    assert set_attention(model, "auto", True, torch.float32)
    assert model.config._attn_implementation == "sdpa"
