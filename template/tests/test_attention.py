"""Documents of a packed row do not see each other, whatever the attention."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from conftest import packed
from src.config import ModelConfig
from src.data.batching import MODEL_INPUTS
from src.models import attention
from src.models.attention import varlen_attention
from src.models.model import load_model
from src.training.trainer import train_epoch
from src.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_equal_separate_ones(make_model, data, kind, mode, checkpointing) -> None:
    model = make_model(attention=kind, gradient_checkpointing=checkpointing)
    alone = make_model(attention="sdpa", packing=False)
    getattr(model, mode)()
    row = packed(data, [3, 1, 4, 0])
    inputs = {k: row[k] for k in MODEL_INPUTS if k in row}
    logits = model(**inputs, use_cache=False).logits[0]
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
def test_q_k_and_v_reach_the_kernel_in_the_one_dtype_of_autocast(
    make_model, data, options, monkeypatch
) -> None:
    # With fp32 weights, rotary embeddings make q and k fp32 and leave v in bf16: a CUDA kernel
    # refuses that, sdpa on a CPU does not mind. pytest -m gpu has the kernel itself.
    seen, attend = set(), attention._attend_by_document

    def spy(*args):
        seen.update(x.dtype for x in args[:3])
        return attend(*args)

    monkeypatch.setattr(attention, "_attend_by_document", spy)
    model = make_model(dtype=torch.bfloat16, **options)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    train_epoch(model, [packed(data, [0, 1])], optimizer, None, CPU, dtype=torch.bfloat16)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"v": lambda x: x.bfloat16()}, "not of one dtype"),
        ({k: lambda x: x.double() for k in "qkv"}, "not half precision"),
        ({"v": lambda x: x[..., :8]}, r"head dimensions \(16, 16, 8\)"),
        ({k: lambda x: x[..., :12] for k in "qkv"}, r"head dimensions \(12, 12, 12\)"),
        ({k: lambda x: x.repeat(1, 1, 1, 17) for k in "qkv"}, r"head dimensions \(272, 272, 272\)"),
        ({k: lambda x: x[:, :3] for k in "kv"}, "no multiple of key and value heads"),
        ({"cu_seq_lens_q": lambda x: x.long()}, "not of int32"),
        ({"cu_seq_lens_q": lambda x: x.to("meta")}, "not on one device"),
        ({"scaling": lambda _: 0.0}, "a scale of 0.0"),
        ({"sliding_window": lambda _: 0}, "a window of 0"),
        ({"dropout": lambda _: 0.1}, "no dropout"),
        ({"softcap": lambda _: 30.0}, "no cap"),
        ({"s_aux": lambda _: torch.zeros(4)}, "no sinks"),
    ],
)
def test_what_the_cuda_kernels_refuse_is_refused_on_every_device(change, reason) -> None:
    options = dict(zip("qkv", torch.randn(3, 1, 4, 8, 16), strict=True))
    options |= {"cu_seq_lens_q": torch.tensor([0, 8], dtype=torch.int32), "max_length_q": 8}
    options |= {name: make(options.get(name)) for name, make in change.items()}
    q, k, v = (options.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=reason):
        varlen_attention(torch.nn.Identity(), q, k, v, None, **options)


def test_varlen_refuses_a_batch_that_is_not_packed(make_model) -> None:
    with pytest.raises(ValueError, match="reads packed batches only"):
        make_model()(torch.arange(8)[None])


def gpt2(tmp_path: Path, tokenizer) -> Path:
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_another_architecture_with_dropout_falls_back_to_masked_attention(
    tmp_path, tokenizer
) -> None:
    config = ModelConfig(name=str(gpt2(tmp_path, tokenizer)))
    model = load_model(config, None, tokenizer, CPU, torch.float32, packing=True)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_knows_no_sdpa_gets_an_attention_that_isolates_documents(
    tmp_path, tokenizer, data
) -> None:
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma2")
    model = load_model(
        ModelConfig(name=str(tmp_path / "gemma2")), None, tokenizer, CPU, torch.float32, True
    )
    assert model.config._attn_implementation == "eager"
    row, at = packed(data, [3, 1, 4]), 0
    inputs = {k: row[k] for k in MODEL_INPUTS if k in row}
    logits = model(**inputs, use_cache=False).logits[0]
    for _, ids, _ in data[[3, 1, 4]]:
        alone = model(torch.tensor(ids)[None].long(), use_cache=False).logits[0]
        assert torch.allclose(logits[at : at + len(ids)], alone, atol=1e-5)
        at += len(ids)


def test_varlen_is_not_tried_on_a_gpu_without_its_kernel(make_model, monkeypatch) -> None:
    model = make_model()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(ValueError, match="flash attention needs a GPU of the Ampere"):
        attention._try_varlen(model, torch.device("cuda"), torch.float16)


def test_varlen_is_refused_where_it_would_compute_something_else(tmp_path, tokenizer) -> None:
    config = ModelConfig(name=str(gpt2(tmp_path, tokenizer)), attention="varlen")
    with pytest.raises(UserError, match=r"model.attention: varlen: .* no dropout"):
        load_model(config, None, tokenizer, CPU, torch.float32, packing=True)
