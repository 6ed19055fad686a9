"""Families of models: each takes a step by default, and keeps packed documents apart."""

import sys
import tempfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from helpers import TEMPLATE

sys.path.insert(0, str(TEMPLATE))
SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
QKVO = ("k_proj", "o_proj", "q_proj", "v_proj")
DENSE = ("down_proj", "gate_proj", *QKVO, "up_proj")
SPARSE = ("experts", "gate", *QKVO)


class Family(NamedTuple):
    """A model type, what its small config needs, and what becomes of it by default."""

    model_type: str
    config: Mapping[str, Any] = MappingProxyType({})
    attention: str = "varlen"
    packs: bool = True
    plain_head: bool = True
    adapted: tuple[str, ...] = DENSE
    frozen: tuple[str, ...] = ()


FAMILIES = {
    "Llama": Family("llama"),
    "Qwen 2.5": Family("qwen2"),
    "Qwen 3": Family("qwen3"),
    "Qwen 3 MoE": Family("qwen3_moe", {**EXPERTS, "num_experts": 4}, adapted=SPARSE),
    "Mistral": Family("mistral", {"sliding_window": 16}),
    "Mixtral": Family("mixtral", {**EXPERTS, "num_local_experts": 4}, adapted=SPARSE),
    "Gemma 2": Family("gemma2", {"sliding_window": 16}, "eager", plain_head=False),
    "Gemma 3": Family("gemma3_text", {"sliding_window": 16}),
    "Phi 3": Family(
        "phi3", {"sliding_window": 16},
        adapted=("down_proj", "gate_up_proj", "o_proj", "qkv_proj"),
    ),
    "Granite": Family("granite", {"logits_scaling": 8.0}, plain_head=False),
    "OLMo 2": Family("olmo2"),
    "SmolLM 3": Family("smollm3"),
    "GLM 4": Family("glm4", adapted=("down_proj", "gate_up_proj", *QKVO)),
    "gpt-oss": Family(
        "gpt_oss", {**EXPERTS, "num_local_experts": 4, "sliding_window": 16}, "eager", packs=False,
        adapted=QKVO, frozen=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "Cohere 2": Family("cohere2", {"sliding_window": 16}, plain_head=False),
    "GPT-2": Family(
        "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, "sdpa",
        adapted=("c_attn", "c_fc", "c_proj"),
    ),
    "Mamba": Family(
        "mamba", {"state_size": 4}, "eager", packs=False,
        adapted=("in_proj", "x_proj"),
    ),
    "Qwen 3.5": Family(
        "qwen3_5_text", {**LINEAR, "num_hidden_layers": 4}, "sdpa", packs=False,
        adapted=(*DENSE[:2], "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "k_proj",
                 "o_proj", "out_proj", "q_proj", "up_proj", "v_proj"),
    ),
}  # fmt: skip


def documents() -> list[Any]:
    from src.data.dataset import Document

    ids = [np.random.default_rng(n).integers(3, 512, 9 + 7 * n) for n in range(4)]
    return [Document(n, row, row.copy()) for n, row in enumerate(ids)]


def load(family: Family, lora: bool) -> tuple[Any, bool]:
    """A family's small model as a run loads it, and whether its rows are packed."""
    import torch
    from transformers import AutoConfig

    from src.config import LoraConfig, ModelConfig
    from src.models.attention import set_attention
    from src.models.model import build_model, load_tokenizer

    torch.set_num_threads(1)  # tiny models: more threads only wait
    torch.manual_seed(0)
    cpu, dtype = torch.device("cpu"), torch.bfloat16 if lora else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        described = {**SMALL, **family.config}
        AutoConfig.for_model(family.model_type, **described).save_pretrained(folder)
        config, adapters = ModelConfig(name=folder, init="random"), LoraConfig(r=4)
        tokenizer = load_tokenizer(ModelConfig(name="configs/tiny"))
        model = build_model(config, adapters if lora else None, tokenizer, cpu, dtype)
    return model, set_attention(model, "auto", True, dtype)


def batch_of(rows: list[Any], packs: bool) -> dict[str, Any]:
    from src.data.batching import collate_packed, collate_padded

    if packs:
        return collate_packed(rows, budget=128, max_length=64, pad_id=2)
    return collate_padded(rows, max_length=64, pad_id=2)


def leak(model: Any, packs: bool) -> float:
    """How much a document's logits depend on what shares its batch."""
    import torch

    from src.data.batching import MODEL_INPUTS

    rows, worst, start = documents(), 0.0, 0
    batch = batch_of(rows, packs)
    inputs = {k: batch[k] for k in MODEL_INPUTS if k in batch}
    with torch.no_grad():
        together = model.eval()(**inputs, use_cache=False).logits
        if model.config._attn_implementation == "varlen":
            model.set_attn_implementation("sdpa")  # which reads a document alone
        for n, document in enumerate(rows):
            ids = torch.from_numpy(document.input_ids)[None]
            expected = model(input_ids=ids, use_cache=False).logits[0]
            found = together[0, start : start + len(expected)] if packs else together[n]
            worst = max(worst, (found[: len(expected)] - expected).abs().max().item())
            start += len(expected)
    return worst


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_packed_documents_apart(name: str) -> None:
    import torch

    from src.models.head import find_plain_head

    family = FAMILIES[name]
    model, packs = load(family, lora=False)
    assert (model.config._attn_implementation, packs) == (family.attention, family.packs)
    head = find_plain_head(model, torch.float32)
    assert (head is not None) == family.plain_head
    assert leak(model, packs) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_adapters_learn_in_bf16(name: str) -> None:
    import torch

    from src.models.adapters import adapted_names, frozen_experts
    from src.training.trainer import training_steps

    family = FAMILIES[name]
    model, packs = load(family, lora=True)
    assert adapted_names(model) == sorted(family.adapted)
    assert frozen_experts(model) == list(family.frozen)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for adapter, p in trained.items():  # B starts at zero, and with it A's gradient
        if "lora_B" in adapter:
            torch.nn.init.normal_(p, std=0.1)
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0, fused=True)
    batch = batch_of(documents(), packs)
    (step,) = training_steps(model, [batch], optimizer, None, torch.device("cpu"))
    assert not [n for n, p in trained.items() if torch.equal(before[n], p)]
    assert step.loss.item() == pytest.approx(np.log(512), rel=0.15)


def test_documents_that_share_a_row_would_be_seen() -> None:
    """The measure itself: with attention without bounds one document can read another."""
    import torch

    model, _ = load(FAMILIES["Llama"], lora=False)
    model.set_attn_implementation("sdpa")
    rows = documents()
    ids = torch.from_numpy(np.concatenate([row.input_ids for row in rows]))[None]
    with torch.no_grad():
        together = model.eval()(input_ids=ids, use_cache=False).logits[0, 9:25]
        alone = model(torch.from_numpy(rows[1].input_ids)[None], use_cache=False).logits[0]
    assert (together - alone).abs().max() > 1e-3
