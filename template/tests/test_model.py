"""Models load, quantize, adapt, save and answer; what cannot be loaded says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import scripts.inference
import scripts.train
from conftest import ROOT
from src.config import LoraConfig, ModelConfig
from src.data import IGNORE
from src.data.batching import collate_packed
from src.models.generation import generate
from src.models.model import load_model, save_model
from src.training.loss import find_plain_head, label_positions, summed_loss
from src.training.trainer import evaluate
from src.utils.errors import UserError

CPU = torch.device("cpu")


def one_batch() -> dict:
    ids = torch.arange(3, 40).numpy()
    return collate_packed([(ids, ids)], 64, 64, pad_id=2)


def adapter_gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    batch = one_batch()
    positions, targets = label_positions(batch["labels"])
    batch |= {"positions": positions, "targets": targets}
    with torch.autocast("cpu", torch.bfloat16):
        summed_loss(model, batch, find_plain_head(model)).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def randomise_adapters(model) -> None:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)


def test_4bit_layers_are_nf4_compute_in_bf16_and_train_adapters_only(make_model) -> None:
    from bitsandbytes.nn import Linear4bit

    model = make_model(lora=True, quantization="4bit", dtype=torch.bfloat16)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 4 * 7
    assert {m.compute_dtype for m in layers} == {torch.bfloat16}
    assert {m.weight.quant_state.quant_type for m in layers} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in layers)
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n and dtype == torch.float32 for n, dtype in trained.items())
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    assert {p.dtype for p in norms} == {torch.bfloat16}, "not blown up to fp32"


def test_4bit_gradients_are_the_same_after_an_evaluation(make_model) -> None:
    # bitsandbytes 0.50 repacks weights when a CPU evaluates, for a kernel without a backward.
    model = make_model(lora=True, quantization="4bit", dtype=torch.bfloat16)
    randomise_adapters(model)
    before = adapter_gradients(model)
    assert all(g.abs().sum() > 0 for g in before.values())
    evaluate(model, [one_batch()], CPU)
    model.train()
    after = adapter_gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_4bit_gradients_equal_those_of_the_dequantized_model(make_model) -> None:
    import bitsandbytes.functional as bnb

    small = make_model(lora=True, quantization="4bit", dtype=torch.bfloat16)
    whole = make_model(lora=True, dtype=torch.bfloat16)
    weights = dict(small.named_parameters())
    with torch.no_grad():
        for name, p in whole.named_parameters():
            if (state := getattr(weights[name], "quant_state", None)) is not None:
                p.copy_(bnb.dequantize_4bit(weights[name].data, state))
    randomise_adapters(small)
    randomise_adapters(whole)
    found, expected = adapter_gradients(small), adapter_gradients(whole)
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, (name, error)


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_saved_loads_with_from_pretrained_and_says_the_same(
    make_model, tokenizer, tmp_path: Path, lora: bool, saved_model: Path
) -> None:  # fmt: skip
    model = make_model(lora=lora, packing=False)
    randomise_adapters(model)
    save_model(model, tokenizer, tmp_path / "m", torch.float32)
    if lora:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(saved_model)
        again = PeftModel.from_pretrained(base, tmp_path / "m")
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert again.config.use_cache, "generation would be slow without"
    ids = torch.arange(3, 30)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == tokenizer.chat_template


def test_a_full_model_trains_in_fp32_and_is_saved_in_the_dtype_it_computes_in(
    make_model, tokenizer, tmp_path: Path
) -> None:  # fmt: skip
    model = make_model(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_model(model, tokenizer, tmp_path / "m", torch.bfloat16)
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_a_batch_of_prompts_gets_the_answers_each_gets_alone(make_model, tokenizer) -> None:
    model = make_model()
    model.train()
    prompts = [
        "Hi",
        "A much longer question than the first one was",
        [{"role": "user", "content": "x"}],
    ]
    together = generate(model, tokenizer, prompts, max_length=8)
    alone = [generate(model, tokenizer, prompt, max_length=8) for prompt in prompts]
    assert together == alone
    assert model.training
    assert model.config._attn_implementation == "varlen", "put back as it was"


def test_generation_counts_new_tokens_and_returns_no_prompt(
    make_model, tokenizer, monkeypatch
) -> None:
    model = make_model(packing=False)
    answer = tokenizer("some answer", return_tensors="pt")["input_ids"]
    asked = {}

    def stub(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        asked.update(
            options, length=input_ids.shape[1], inference=torch.is_inference_mode_enabled()
        )
        return torch.cat([input_ids, answer], dim=1)

    monkeypatch.setattr(model, "generate", stub)
    assert generate(model, tokenizer, "a long prompt " * 10, max_length=12) == "some answer"
    assert asked["max_new_tokens"] == 12 < asked["length"]
    assert asked["inference"]
    assert asked["eos_token_id"] == [tokenizer.eos_token_id]


def test_gradient_checkpointing_covers_every_nth_layer(make_model) -> None:
    model = make_model(gradient_checkpointing=True, every_n_layers=2)
    assert sum(getattr(m, "gradient_checkpointing", False) for m in model.model.layers) == 2


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
    from transformers import MambaConfig

    folder = tmp_path / "mamba"
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(UserError, match=r"data.packing: mamba has layers that carry state"):
        load_model(ModelConfig(name=str(folder)), None, tokenizer, CPU, torch.float32, packing=True)


def test_a_model_without_linear_layers_cannot_be_quantized(make_model, tokenizer, monkeypatch):
    import bitsandbytes.nn as bnb

    from src.models.model import _check_loaded

    monkeypatch.setattr(bnb, "Linear4bit", torch.nn.Conv3d)  # as if none had been replaced
    monkeypatch.setattr(bnb, "Linear8bitLt", torch.nn.Conv3d)
    config = ModelConfig(name="org/odd", quantization="4bit")
    with pytest.raises(UserError, match=r"model.quantization: org/odd has no layer that bitsandby"):
        _check_loaded(make_model(), config, tokenizer, packing=True)


def test_target_modules_that_match_nothing_are_named(saved_model: Path, tokenizer) -> None:
    with pytest.raises(UserError, match=r"lora.target_modules: .*nothing_like_it"):
        load_model(
            ModelConfig(name=str(saved_model)), LoraConfig(target_modules=["nothing_like_it"]),
            tokenizer, CPU, torch.float32, packing=True,
        )  # fmt: skip


SMOKE = str(ROOT / "configs/smoke.yaml")


def broken(saved_model: Path, tmp_path: Path, remove: str = "", **config: object) -> Path:
    folder = tmp_path / "broken"
    shutil.copytree(saved_model, folder)
    for file in folder.glob(remove or "nothing"):
        file.unlink()
    if config:
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(described | config))
    return folder


@pytest.mark.parametrize(
    ("remove", "config", "override", "expected"),
    [
        ("token*", {}, "lora.r=4", "no tokenizer in this folder"),
        ("*.safetensors", {}, "lora.r=4", "no safetensors weights in this folder; model.init=random"),
        ("config.json", {}, "lora.r=4", "no config.json in this folder"),
        ("", {"quantization_config": {"quant_method": "gptq"}}, "model.quantization=4bit", "is quantized already (gptq)"),
    ],
)  # fmt: skip
def test_a_model_folder_that_lacks_something_is_refused_before_loading(
    saved_model, tmp_path, refused, remove, config, override, expected
) -> None:  # fmt: skip
    folder = broken(saved_model, tmp_path, remove, **config)
    output = tmp_path / "run"
    lines = refused(
        scripts.train.main, SMOKE, f"model.name={folder}", "model.init=pretrained", "lora.r=4",
        override, f"output_dir={output}",
    )  # fmt: skip
    assert expected in lines[0]
    assert not output.exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=some-org/absent-model", "model.init=pretrained"], "is not on this machine and could not be fetched"),
        (["model.name=configs/absent"], "no such folder"),
        (["model.name=some-org/absent-model"], "random needs a local folder"),
        (["device=cuda"], "cuda is not available"),
        (["model.attention=flash_attention_9"], "model.attention: flash_attention_9"),
        (["model.attention=varlen", "data.packing=false"], "varlen reads packed batches"),
        (["training.resume=outputs/none"], "training.resume: outputs/none: not a checkpoint"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line(tmp_path, refused, overrides, expected) -> None:
    if "device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so device=cuda is right here")
    output = tmp_path / "run"
    lines = refused(
        scripts.train.main, SMOKE, f"output_dir={output}", "tracking.enabled=false", *overrides
    )
    assert len(lines) == 1
    assert expected in lines[0], lines
    assert not output.exists()


def test_a_gated_model_says_where_to_ask_and_where_the_token_goes(monkeypatch) -> None:
    from src.models import model as module

    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\n401 Client Error.")

    monkeypatch.setattr(module.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"org/gated is gated: ask for access .*HF_TOKEN"):
        module.load_tokenizer(ModelConfig(name="org/gated"))


def test_code_from_a_model_repository_is_not_run(saved_model, tmp_path, refused) -> None:
    marker = tmp_path / "executed"
    folder = broken(
        saved_model, tmp_path, model_type="custom",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )  # fmt: skip
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    lines = refused(
        scripts.train.main, SMOKE, f"model.name={folder}", "model.init=pretrained",
        "lora.r=4", f"output_dir={tmp_path / 'run'}", "tracking.enabled=false",
    )  # fmt: skip
    assert "model.trust_remote_code=true" in lines[0]
    assert not marker.exists()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda folder: folder / "absent", "no such folder"),
        (lambda folder: folder, "not a saved model; did you mean"),
    ],
)
def test_inference_refuses_what_is_no_model(tmp_path, refused, make, expected) -> None:
    (tmp_path / "final").mkdir()
    assert expected in refused(scripts.inference.main, str(make(tmp_path)), "hi")[0]


def test_labels_shift_by_one() -> None:
    labels = torch.tensor([[IGNORE, 5, IGNORE, 7]])
    positions, targets = label_positions(labels)
    assert positions[:2].tolist() == [0, 2]
    assert targets[:3].tolist() == [5, 7, IGNORE]
