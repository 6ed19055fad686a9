"""Models load, quantize, adapt and save; what cannot be loaded says why."""

import copy
import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import scripts.train
import src.models.model as model_module
from conftest import SMOKE
from src.config import LoraConfig, ModelConfig
from src.data.batching import collate_packed
from src.data.dataset import Document
from src.models.adapters import without_input_casts
from src.models.generation import generate
from src.models.model import (
    build_model,
    check_positions,
    load_model,
    load_tokenizer,
    resolve,
    save_model,
)
from src.trained import load_trained
from src.training.loss import find_plain_head, summed_loss
from src.training.trainer import evaluate
from src.utils.errors import UserError

CPU = torch.device("cpu")


def one_batch() -> dict:
    ids = torch.arange(3, 40).numpy()
    return collate_packed([Document(0, ids, ids)], budget=64, max_length=64, pad_id=2)


def adapter_gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with without_input_casts(model), torch.autocast("cpu", torch.bfloat16):
        head = find_plain_head(model, CPU, torch.bfloat16)
        summed_loss(model, one_batch(), head).backward()
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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that operators made and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.held = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = True
                self.held += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        return out

    def release(self, size: int) -> None:
        self.held -= size


def test_checkpointing_frees_what_8bit_layers_keep(make_model) -> None:
    # bitsandbytes' 8-bit matmul keeps its input outside of save_for_backward, where only
    # reentrant checkpointing frees it: without, 0.57 is left here.
    held, gradients = {}, {}
    for checkpointing in (False, True):
        model = make_model(
            lora=True, quantization="8bit", dtype=torch.bfloat16,
            gradient_checkpointing=checkpointing,
        ).train()  # fmt: skip
        randomise_adapters(model)
        head = find_plain_head(model, CPU, torch.bfloat16)
        with without_input_casts(model), torch.autocast("cpu", torch.bfloat16), LiveBytes() as live:
            loss = summed_loss(model, one_batch(), head)
            gc.collect()
            held[checkpointing] = live.held
            loss.backward()
        found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        gradients[checkpointing] = torch.cat(found)
    assert held[True] < 0.5 * held[False], held
    assert torch.equal(gradients[True], gradients[False])


def test_checkpoints_are_kept_in_the_hosts_memory_on_a_gpu(make_model) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_offload": True}
    make_model(**options)  # on a CPU they are there already
    for place, expected in (("cuda", True), ("cpu", False)):
        enable = Mock()
        model = SimpleNamespace(device=torch.device(place), activation_checkpointing_enable=enable)
        model_module.checkpoint_layers(model, ModelConfig(name="x", **options))
        assert enable.call_args.kwargs["offload"] is expected


def test_a_model_without_linear_layers_cannot_be_quantized(make_model, monkeypatch) -> None:
    import bitsandbytes.nn as bnb

    monkeypatch.setattr(bnb, "Linear4bit", torch.nn.Conv3d)  # as if none had been replaced
    monkeypatch.setattr(bnb, "Linear8bitLt", torch.nn.Conv3d)
    model = make_model()
    monkeypatch.setattr(model_module, "read_weights", lambda *_, **__: model)
    expected = r"model.quantization: .* has no layer that bitsandbytes can quantize"
    with pytest.raises(UserError, match=expected):
        make_model(lora=True, quantization="4bit")


@pytest.mark.parametrize("kind", ["rslora", "dora"])
@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_other_kinds_of_lora_learn_and_are_saved(
    saved_model: Path, tokenizer, tmp_path: Path, kind: str, quantization: str
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name=str(saved_model), quantization=quantization)
    lora = LoraConfig(r=4, alpha=8, **{kind: True})
    model = load_model(config, lora, tokenizer, CPU, torch.bfloat16, packing=True)
    randomise_adapters(model)
    gradients = adapter_gradients(model)
    assert all(g.abs().sum() > 0 for g in gradients.values())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    magnitudes = [name for name in gradients if "magnitude" in name]
    assert bool(magnitudes) == (kind == "dora")
    scales = [getattr(m, "scaling", None) for m in model.modules()]
    (scale,) = {each["default"] for each in scales if isinstance(each, dict)}
    assert scale == (8 / 2 if kind == "rslora" else 8 / 4)
    save_model(model, tokenizer, tmp_path / "m", torch.bfloat16)
    again, _ = load_trained(tmp_path / "m", CPU)
    loaded = {n: p for n, p in again.named_parameters() if "lora_" in n}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(loaded[name], p), name


def test_target_modules_that_match_nothing_are_named(saved_model: Path, tokenizer) -> None:
    with pytest.raises(UserError, match=r"lora.target_modules: .*nothing_like_it"):
        load_model(
            ModelConfig(name=str(saved_model)), LoraConfig(target_modules=["nothing_like_it"]),
            tokenizer, CPU, torch.float32, packing=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("modules_to_save", ["embed_tokens", "embed_out"]),
        ("target_modules", ["q_proj", "embed_out"]),
        ("target_parameters", ["q_proj.weight", "embed_out"]),
    ],
)
def test_one_name_that_matches_nothing_is_refused_beside_others_that_do(
    saved_model: Path, tokenizer, key: str, names: list[str]
) -> None:
    with pytest.raises(UserError, match=rf"^lora.{key}: LlamaForCausalLM has no embed_out") as told:
        load_model(
            ModelConfig(name=str(saved_model)), LoraConfig(**{key: names}), tokenizer, CPU,
            torch.float32, packing=True,
        )  # fmt: skip
    advised = "its embeddings and head are embed_tokens, lm_head" in str(told.value)
    assert advised == (key == "modules_to_save")


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "q_proj|("},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_what_peft_cannot_make_of_target_modules_is_one_line(
    saved_model: Path, tokenizer, lora: dict
) -> None:
    with pytest.raises(UserError, match=r"^lora.target_modules: \S"):
        load_model(
            ModelConfig(name=str(saved_model)), LoraConfig(**lora), tokenizer, CPU, torch.float32,
            packing=True,
        )  # fmt: skip


def test_a_gated_model_says_where_to_ask_and_where_the_token_goes(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\n401 Client Error.")

    monkeypatch.setattr(model_module.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(model_module, "resolve", str)
    with pytest.raises(UserError, match=r"org/gated is gated: ask for access .*HF_TOKEN"):
        load_tokenizer(ModelConfig(name="org/gated"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            OSError("Error while deserializing header: 14013 bytes at 0x4030"),
            "could not be loaded: ",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "does not fit: try model.quantization=4bit",
        ),
    ],
)
def test_what_went_wrong_while_loading_gets_its_own_advice(monkeypatch, error, advice) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(model_module.AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(model_module, "resolve", str)
    with pytest.raises(UserError, match=f"org/broken {advice}"):
        load_tokenizer(ModelConfig(name="org/broken"))


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch) -> None:
    asked: list[str] = []

    def answer(_: object, name: str, **__: object) -> None:
        asked.append(name)
        if name == "org/gone":
            raise HfHubHTTPError(
                "404", response=cast(Any, SimpleNamespace(headers={}, request=None))
            )
        raise RuntimeError("whatever this version of the hub's library raises")

    monkeypatch.setattr(model_module.HfApi, "model_info", answer)
    with pytest.raises(UserError, match="org/away is not on this machine and could not be"):
        resolve("org/away")
    assert resolve("org/gone") == "org/gone", "it answered: what loads the model explains it"
    assert asked == ["org/away", "org/gone"]
    monkeypatch.setattr(model_module, "try_to_load_from_cache", lambda *_: "a/file")
    assert resolve("org/here") == "org/here"
    assert len(asked) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_4bit_layers_compute_in_the_half_precision_of_the_run(make_model, dtype) -> None:
    from bitsandbytes.nn import Linear4bit

    model = make_model(lora=True, quantization="4bit", dtype=dtype)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert {layer.compute_dtype for layer in layers} == {dtype}


def test_code_from_a_model_repository_is_not_run(saved_model: Path, tokenizer, tmp_path) -> None:
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
        load_model(ModelConfig(name=str(folder)), None, tokenizer, CPU, torch.float32, packing=True)
    assert not marker.exists()


def tuned(saved_model: Path, tokenizer, **lora):
    """The tiny model in bf16 with LoRA r=4, as `lora` says otherwise."""
    torch.manual_seed(0)
    config, adapters = ModelConfig(name=str(saved_model)), LoraConfig(r=4, alpha=8, **lora)
    return load_model(config, adapters, tokenizer, CPU, torch.bfloat16, packing=True)


def loss_of(model) -> float:
    model.eval()
    return evaluate(model, [one_batch()], "cpu", torch.bfloat16).loss


def test_a_saved_adapter_goes_on_where_it_was_and_keeps_its_rank(
    saved_model: Path, tokenizer, tmp_path: Path
) -> None:
    first = tuned(saved_model, tokenizer, target_modules=["q_proj"])
    randomise_adapters(first)
    save_model(first, tokenizer, tmp_path / "first", torch.bfloat16)
    described = tmp_path / "first/adapter_config.json"
    described.write_text(described.read_text().replace(str(saved_model), "/where/it/once/was"))
    second = tuned(saved_model, tokenizer, adapter=str(tmp_path / "first"), dora=True)
    trained = {name: p for name, p in second.named_parameters() if p.requires_grad}
    assert {p.shape[0] for name, p in trained.items() if "lora_A" in name} == {4}
    assert all("q_proj" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert loss_of(second) == loss_of(first) != loss_of(tuned(saved_model, tokenizer))
    assert all(g.abs().sum() > 0 for g in adapter_gradients(second).values())
    save_model(second, tokenizer, tmp_path / "second", torch.bfloat16)
    loaded, _ = load_trained(tmp_path / "second", CPU)  # finds its base where it is now
    assert loaded.peft_config["default"].r == 4


def test_what_is_no_adapter_for_this_model_is_refused(
    saved_model: Path, tokenizer, tmp_path: Path
) -> None:
    import peft

    config = AutoConfig.from_pretrained(saved_model)
    config.hidden_size, config.head_dim = 96, 24
    kinds = {"other": peft.LoraConfig(target_modules=["q_proj"]), "ia3": peft.IA3Config()}
    for name, kind in kinds.items():
        model = AutoModelForCausalLM.from_config(config)
        peft.get_peft_model(model, kind).save_pretrained(tmp_path / name)
    for name, expected in {
        "other": "made for another model than",
        "ia3": "a PeftType.IA3 adapter, and this project trains LoRA alone",
        "nobody/has-this": "nobody/has-this",
    }.items():
        place = str(tmp_path / name) if name in kinds else name
        with pytest.raises(UserError, match=f"lora.adapter: .*{expected}"):
            tuned(saved_model, tokenizer, adapter=place)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_modules_train_in_fp32_beside_adapters_and_come_back(
    saved_model: Path, tokenizer, tmp_path: Path, tied: bool
) -> None:
    config = AutoConfig.from_pretrained(saved_model, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = tuned(tmp_path / "base", tokenizer, modules_to_save=["embed_tokens", "lm_head"])
    whole = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert len(whole) == 2 - tied
    assert {p.dtype for p in whole.values()} == {torch.float32}
    head = find_plain_head(model, CPU, torch.bfloat16)
    assert head is not None  # its logits are made in chunks all the same
    assert head.linear.weight.requires_grad
    with torch.no_grad():
        for p in whole.values():
            p.mul_(8)
    randomise_adapters(model)
    save_model(model, tokenizer, tmp_path / "m", torch.bfloat16)
    loaded, _ = load_trained(tmp_path / "m", CPU)
    assert loss_of(loaded) == pytest.approx(loss_of(model), rel=0.01)
    assert loss_of(loaded) != pytest.approx(loss_of(tuned(tmp_path / "base", tokenizer)), rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])  # whose embeddings have other names
def test_new_tokens_are_refused_with_the_way_out(kind: str, tokenizer, tmp_path) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    more, folder = copy.deepcopy(tokenizer), tmp_path / "base"
    more.add_tokens(["<mine>"])
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"'<mine>' is the first without") as told:
        tuned(folder, more)
    *_, advice = str(told.value).partition("lora.modules_to_save=")
    base.resize_token_embeddings(len(more))
    base.save_pretrained(folder)
    more.save_pretrained(folder)
    lora = LoraConfig(r=4, modules_to_save=advice.strip("[]").split(","))
    model = build_model(ModelConfig(name=str(folder)), lora, more, CPU, torch.float32)
    shapes = [p.shape for n, p in model.named_parameters() if "modules_to_save" in n]
    assert shapes == [(len(more), 32)] * 2


def test_what_cannot_be_saved_is_refused_before_the_first_step(
    saved_model: Path, tmp_path: Path, refused, monkeypatch
) -> None:
    def refuse(self, *_, **__):
        raise ValueError("a value\nthat the library refuses")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    arguments = [SMOKE, f"output_dir={tmp_path / 'run'}", "device=cpu", "tracking.enabled=false"]
    (line,) = refused(scripts.train.main, *arguments)
    assert line.endswith("cannot be saved: a value that the library refuses")
    assert not (tmp_path / "run").exists()


TABLES = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]],
                "max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_documents_beyond_learnt_positions_are_refused_before_loading(
    kind: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(kind, vocab_size=512, **TABLES[kind]).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    check_positions(config, 64)
    with pytest.raises(UserError, match=r"data.max_length: 65 is more than the 64 positions"):
        check_positions(config, 65)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises((IndexError, RuntimeError)):  # what the refusal is for
        model(torch.ones(1, 70, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("kind", ["llama", "xglm"])
def test_positions_that_are_computed_have_no_end(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "xglm":
        sizes = {"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 64}
    described = AutoConfig.for_model(kind, vocab_size=99, max_position_embeddings=64, **sizes)
    described.save_pretrained(tmp_path)
    check_positions(ModelConfig(name=str(tmp_path)), 128)


def test_8bit_layers_train_and_answer_without_a_log_line_each(
    make_model, tokenizer, caplog
) -> None:
    model = make_model(lora=True, quantization="8bit", dtype=torch.bfloat16)
    adapter_gradients(model)
    generate(model, tokenizer, "Hi", max_length=2)
    assert not [record for record in caplog.records if "bitsandbytes" in record.name]


def test_a_saved_dora_adapter_is_refused_on_8bit_weights(
    saved_model: Path, tokenizer, tmp_path: Path, make_model
) -> None:
    config, lora = ModelConfig(name=str(saved_model)), LoraConfig(r=4, dora=True)
    model = load_model(config, lora, tokenizer, CPU, torch.bfloat16, packing=True)
    save_model(model, tokenizer, tmp_path / "dora", torch.bfloat16)
    with pytest.raises(UserError, match="a DoRA adapter does not work on 8-bit weights"):
        load_trained(tmp_path / "dora", CPU, quantization="8bit")
