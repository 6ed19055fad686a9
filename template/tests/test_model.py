"""Models load, quantize, adapt and save; what cannot be loaded says why."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src.config import LoraConfig, ModelConfig
from src.data.batching import collate_packed
from src.data.dataset import Document
from src.models.head import find_plain_head
from src.models.model import build_model, save_model
from src.trained import find_trained, load_trained
from src.training.loss import summed_loss
from src.training.trainer import evaluate
from src.utils.errors import UserError

CPU = torch.device("cpu")


def one_batch() -> dict:
    ids = torch.arange(3, 40).numpy()
    return collate_packed([Document(0, ids, ids)], budget=64, max_length=64, pad_id=2)


def adapter_gradients(model) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        head = find_plain_head(model, torch.bfloat16)
        summed_loss(model, one_batch(), head).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def randomise_adapters(model) -> None:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)


def loss_of(model) -> float:
    return evaluate(model.eval(), [one_batch()], "cpu", torch.bfloat16)


@pytest.fixture
def tune(make_model):
    """Make the tiny model in bf16 with random adapters: `tune(name="folder", r=8, dora=True)`."""

    def make(quantization: str = "none", name: Any = None, **lora):
        given = {"name": str(name)} if name else {}
        model = make_model(lora, dtype=torch.bfloat16, quantization=quantization, **given)
        randomise_adapters(model)
        return model

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_4bit_layers_are_nf4_and_compute_in_half_precision_under_fp32_adapters(
    make_model, dtype
) -> None:
    from bitsandbytes.nn import Linear4bit

    model = make_model(lora=True, quantization="4bit", dtype=dtype)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7
    assert {m.compute_dtype for m in layers} == {dtype}
    assert {m.weight.quant_state.quant_type for m in layers} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in layers)
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n and dtype == torch.float32 for n, dtype in trained.items())
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    assert {p.dtype for p in norms} == {dtype}, "not converted to fp32"


def test_4bit_gradients_equal_those_of_the_dequantized_model_before_and_after_an_evaluation(
    tune,
) -> None:
    import bitsandbytes.functional as bnb

    small, whole = tune("4bit", r=4), tune(r=4)
    weights = dict(small.named_parameters())
    with torch.no_grad():
        for name, p in whole.named_parameters():
            if (state := getattr(weights[name], "quant_state", None)) is not None:
                p.copy_(bnb.dequantize_4bit(weights[name].data, state))
    found, expected = adapter_gradients(small), adapter_gradients(whole)
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, (name, error)
    # bitsandbytes 0.50 repacks weights when a CPU evaluates, for a kernel without a backward.
    loss_of(small)
    after = adapter_gradients(small)
    assert all(torch.equal(found[name], after[name]) for name in found)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_loads_with_from_pretrained_and_says_the_same(
    make_model, tokenizer, tmp_path: Path, lora: bool, saved_model: Path
) -> None:  # fmt: skip
    model = make_model(lora=lora, packing=False)
    randomise_adapters(model)
    save_model(model, tokenizer, tmp_path, torch.float32)
    if lora:
        base = AutoModelForCausalLM.from_pretrained(saved_model)
        again = peft.PeftModel.from_pretrained(base, tmp_path)
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.config.use_cache, "generation would be slow without"
    ids = torch.arange(3, 30)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


def test_a_full_model_trains_in_fp32_and_is_saved_in_the_dtype_it_computes_in(
    make_model, tokenizer, tmp_path: Path
) -> None:  # fmt: skip
    model = make_model(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_model(model, tokenizer, tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "quantization"), [("rslora", "none"), ("dora", "4bit")])
def test_other_kinds_of_lora_learn_and_are_saved(
    tune, tokenizer, tmp_path: Path, kind: str, quantization: str
) -> None:
    model = tune(quantization, **{kind: True})
    gradients = adapter_gradients(model)
    assert all(g.abs().sum() > 0 for g in gradients.values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert any("magnitude" in name for name in gradients) == (kind == "dora")
    scales = [getattr(m, "scaling", None) for m in model.modules()]
    (scale,) = {each["default"] for each in scales if isinstance(each, dict)}
    assert scale == (8 / 2 if kind == "rslora" else 8 / 4)
    save_model(model, tokenizer, tmp_path / "m", torch.bfloat16)
    again, _ = load_trained(find_trained(str(tmp_path / "m")), CPU)
    loaded = {n: p for n, p in again.named_parameters() if "lora_" in n}
    assert all(torch.equal(loaded[n], p) for n, p in model.named_parameters() if p.requires_grad)
    if kind == "dora":
        with pytest.raises(UserError, match="DoRA does not work on 8-bit weights"):
            load_trained(find_trained(str(tmp_path / "m")), CPU, quantization="8bit")


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"target_modules": ["q_proj", "embed_out"]}, "lora.target_modules: .* has no embed_out$"),
        ({"target_modules": "q_proj|("}, r"lora.target_modules: \S"),
        ({"target_modules": "nothing_like_it"}, "lora.target_modules: .*nothing_like_it"),
        ({"target_parameters": ["q_proj.weight", "embed_out"]}, "lora.target_parameters: .* no embed_out$"),
        ({"modules_to_save": ["embed_tokens", "embed_out"]}, "lora.modules_to_save: .* no embed_out$"),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, "lora.target_modules: modules_to_save cannot be applied to"),
    ],
)  # fmt: skip
def test_layers_that_lora_cannot_take_are_named_in_one_line(tune, lora, expected) -> None:
    with pytest.raises(UserError, match=f"^{expected}"):
        tune(**lora)


def test_a_model_that_is_not_here_is_named_with_its_key(make_model) -> None:
    with pytest.raises(UserError, match=r"^model.name: org/away is not on this machine"):
        make_model(name="org/away")
    with pytest.raises(UserError, match=r"^lora.adapter: org/away is not on this machine"):
        make_model({"adapter": "org/away"})


def test_code_from_a_model_repository_is_not_run(saved_model: Path, make_model, tmp_path) -> None:
    marker, folder = tmp_path / "executed", tmp_path / "evil"
    shutil.copytree(saved_model, folder)
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(UserError, match=r"model.trust_remote_code=true"):
        make_model(name=str(folder))
    assert not marker.exists()


def test_a_saved_adapter_is_trained_further_and_keeps_its_rank(
    tune, saved_model: Path, tokenizer, tmp_path: Path
) -> None:
    first = tune(target_modules=["q_proj"])
    save_model(first, tokenizer, tmp_path / "first", torch.bfloat16)
    described = tmp_path / "first/adapter_config.json"
    described.write_text(described.read_text().replace(str(saved_model), "/where/it/once/was"))
    second = tune(adapter=str(tmp_path / "first"), r=8, dora=True)
    trained = {name: p for name, p in second.named_parameters() if p.requires_grad}
    assert {p.shape[0] for name, p in trained.items() if "lora_A" in name} == {4}
    assert all("q_proj" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert loss_of(second) == loss_of(first) != loss_of(tune())
    assert all(g.abs().sum() > 0 for g in adapter_gradients(second).values())
    save_model(second, tokenizer, tmp_path / "second", torch.bfloat16)
    loaded, _ = load_trained(
        find_trained(str(tmp_path / "second")), CPU
    )  # its base is named by its place now
    assert loaded.peft_config["default"].r == 4


@pytest.mark.parametrize("tied", [False, True])
def test_whole_modules_train_in_fp32_beside_adapters_and_come_back(
    tune, saved_model: Path, tokenizer, tmp_path: Path, tied: bool
) -> None:
    config = AutoConfig.from_pretrained(saved_model, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = tune(name=tmp_path / "base", modules_to_save=["embed_tokens", "lm_head"])
    whole = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert len(whole) == 2 - tied
    assert {p.dtype for p in whole.values()} == {torch.float32}
    head = find_plain_head(model, torch.bfloat16)
    assert head is not None, "its logits are computed in chunks too"
    assert head.linear.weight.requires_grad
    before = loss_of(model)
    with torch.no_grad():
        for p in whole.values():
            p.mul_(8)
    save_model(model, tokenizer, tmp_path / "m", torch.bfloat16)
    loaded, _ = load_trained(find_trained(str(tmp_path / "m")), CPU)
    assert loss_of(loaded) == pytest.approx(loss_of(model), rel=0.01)
    assert loss_of(loaded) != pytest.approx(before, rel=0.01)


def test_new_tokens_are_refused_with_the_way_out(tokenizer, saved_model, tmp_path) -> None:
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<mine>"])
    base = AutoModelForCausalLM.from_pretrained(saved_model)
    base.save_pretrained(tmp_path)

    def build(*whole: str):
        lora = LoraConfig(r=4, modules_to_save=[*whole] or None)
        return build_model(ModelConfig(name=str(tmp_path)), lora, more, CPU, torch.float32)

    with pytest.raises(UserError, match=r"call model.resize_token_embeddings") as refusal:
        build()
    base.resize_token_embeddings(len(more))
    base.save_pretrained(tmp_path)
    *_, advice = str(refusal.value).partition("lora.modules_to_save=")
    model = build(*advice.strip("[]").split(","))
    shapes = [p.shape[0] for n, p in model.named_parameters() if "modules_to_save" in n]
    assert shapes == [len(more)], "the head is tied to the embeddings"
