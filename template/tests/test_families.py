"""Families of models: each takes a step by default, and keeps packed documents apart.

`uv run python tests/test_families.py` prints the table.
"""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from src.config import LoraConfig, ModelConfig
from src.data.batching import MODEL_INPUTS, collate_packed, collate_padded
from src.data.dataset import Document
from src.models.adapters import adapted_names, frozen_experts
from src.models.attention import isolates_documents
from src.models.model import load_model, load_tokenizer
from src.training.loss import find_plain_head
from src.training.trainer import training_steps

CPU = torch.device("cpu")
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


class Found(NamedTuple):
    """What a family turned out to do: a row of the table."""

    attention: str
    packs: bool
    plain_head: bool
    adapted: tuple[str, ...]
    frozen: tuple[str, ...]
    leak: float  # the largest difference of a logit to the document alone
    loss: float  # of a step under bf16 autocast
    moved: bool  # whether that step changed every adapter


def documents() -> list[Document]:
    ids = [np.random.default_rng(n).integers(3, 512, 9 + 7 * n) for n in range(4)]
    return [Document(n, row, row.copy()) for n, row in enumerate(ids)]


def load(family: Family, folder: Path, lora: bool, **model: Any):
    torch.manual_seed(0)
    AutoConfig.for_model(family.model_type, **{**SMALL, **family.config}).save_pretrained(folder)
    config = ModelConfig(name=str(folder), init="random", **model)
    tokenizer = load_tokenizer(ModelConfig(name="configs/tiny"))
    dtype = torch.bfloat16 if lora else torch.float32
    return load_model(config, LoraConfig(r=4) if lora else None, tokenizer, CPU, dtype, True)


def batch_of(rows: list[Document], packs: bool) -> dict[str, Any]:
    if packs:
        return collate_packed(rows, budget=128, max_length=64, pad_id=2)
    return collate_padded(rows, max_length=64, pad_id=2)


@torch.no_grad()
def leak(model, packs: bool) -> float:
    """How much a document's logits depend on what shares its batch."""
    rows, worst, start = documents(), 0.0, 0
    batch = batch_of(rows, packs)
    inputs = {k: batch[k] for k in MODEL_INPUTS if k in batch}
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


def examine(family: Family) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        model = load(family, Path(folder), lora=False)
        attention, packs = (
            model.config._attn_implementation,
            isolates_documents(model, CPU, torch.float32),
        )
        plain = find_plain_head(model, CPU, torch.float32) is not None
        difference = leak(copy.deepcopy(model), packs)
        model = load(family, Path(folder), lora=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():  # B starts at zero, and with it A's gradient
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0, fused=True)
    batch = batch_of(documents(), packs)
    (step,) = training_steps(model, [batch], optimizer, None, CPU)
    moved = all(not torch.equal(before[n], p) for n, p in trained.items())
    names, frozen = adapted_names(model), frozen_experts(model)
    loss = step.loss.item()
    return Found(attention, packs, plain, tuple(names), tuple(frozen), difference, loss, moved)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_by_default_and_keeps_packed_documents_apart(name: str) -> None:
    family, found = FAMILIES[name], examine(FAMILIES[name])
    assert found[:5] == (*family[2:5], tuple(sorted(family.adapted)), family.frozen)
    assert found.leak < 1e-4
    assert found.moved
    assert found.loss == pytest.approx(np.log(512), rel=0.15)


def test_documents_that_share_a_row_would_be_seen(tmp_path: Path) -> None:
    # The measure itself: attention without bounds, and a row that one document could read on.
    model = load(FAMILIES["Llama"], tmp_path, lora=False)
    model.set_attn_implementation("sdpa")
    rows = documents()
    ids = torch.from_numpy(np.concatenate([row.input_ids for row in rows]))[None]
    with torch.no_grad():
        together = model.eval()(input_ids=ids, use_cache=False).logits[0, 9:25]
        alone = model(torch.from_numpy(rows[1].input_ids)[None], use_cache=False).logits[0]
    assert (together - alone).abs().max() > 1e-3


def main() -> None:
    print(
        "| family | attention | batches | head | all-linear adapts | experts left | leak | loss |"
    )
    print("|---|---|---|---|---|---|---:|---:|")
    for name, family in FAMILIES.items():
        f = examine(family)
        cells = [name, f.attention, "packed" if f.packs else "padded"]
        cells += ["in chunks" if f.plain_head else "its own", " ".join(f.adapted)]
        cells += [" ".join(f.frozen) or "-", f"{f.leak:.0e}", f"{f.loss:.3f}"]
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
