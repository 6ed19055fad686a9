"""Documents of a packed row do not see each other, whatever the attention."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, MambaConfig

from conftest import packed
from src.config import ModelConfig
from src.data.batching import MODEL_INPUTS
from src.models.attention import varlen_attention
from src.models.model import load_model
from src.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_equal_separate_ones(
    make_model, data, attention, mode, checkpointing
) -> None:
    model = make_model(attention=attention, gradient_checkpointing=checkpointing)
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


def test_layers_that_carry_state_are_not_packed(tmp_path: Path, tokenizer) -> None:
    folder = tmp_path / "mamba"
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(UserError, match=r"data.packing: mamba has layers that carry state"):
        load_model(ModelConfig(name=str(folder)), None, tokenizer, CPU, torch.float32, packing=True)
