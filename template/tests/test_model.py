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

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import scripts.train
from conftest import SMOKE
from src.config import LoraConfig, ModelConfig
from src.data.batching import collate_packed
from src.data.dataset import Document
from src.models import loading
from src.models import model as model_module
from src.models.adapters import without_input_casts
from src.models.generation import generate
from src.models.head import find_plain_head
from src.models.model import build_model, check_positions, save_model
from src.trained import find_trained, load_trained
from src.training.loss import summed_loss
from src.training.trainer import evaluate
from src.utils.environment import load_environment
from src.utils.errors import UserError

CPU = torch.device("cpu")


def one_batch() -> dict:
    ids = torch.arange(3, 40).numpy()
    return collate_packed([Document(0, ids, ids)], budget=64, max_length=64, pad_id=2)


def adapter_gradients(model) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    with without_input_casts(model), torch.autocast("cpu", torch.bfloat16):
        head = find_plain_head(model, CPU, torch.bfloat16)
        summed_loss(model, one_batch(), head).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def randomise_adapters(model) -> None:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)


def loss_of(model) -> float:
    return evaluate(model.eval(), [one_batch()], "cpu", torch.bfloat16).loss


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


def test_checkpointing_frees_what_8bit_layers_keep_and_nothing_is_logged(
    make_model, tokenizer, caplog
) -> None:
    # bitsandbytes' 8-bit matmul keeps its input outside of save_for_backward, where only
    # reentrant checkpointing frees it: without, 0.57 is left here.
    load_environment()  # as each script does; it sets the levels of loggers
    held, gradients = {}, {}
    for checkpointing in (False, True):
        model = make_model(
            lora=True, quantization="8bit", dtype=torch.bfloat16,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
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
    generate(model, tokenizer, "Hi", max_length=2)
    assert not [record for record in caplog.records if "bitsandbytes" in record.name]


def test_checkpoints_are_kept_in_the_hosts_memory_on_a_gpu(make_model) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_offload": True}
    make_model(**options)  # on a CPU they are there already
    for place, expected in (("cuda", True), ("cpu", False)):
        enable = Mock()
        model = SimpleNamespace(device=torch.device(place), activation_checkpointing_enable=enable)
        model_module.checkpoint_layers(cast(Any, model), ModelConfig(name="x", **options))
        assert enable.call_args.kwargs["offload"] is expected


def test_a_model_without_linear_layers_cannot_be_quantized(make_model) -> None:
    config = ModelConfig(name="x", quantization="4bit")  # whose layers bitsandbytes did not replace
    with pytest.raises(UserError, match=r"model.quantization: x has no layer that bitsandbytes"):
        model_module._check_quantized(make_model(), config)


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


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError("You are trying to access a gated repo.\n401"), "org/x is gated: ask for access .*HF_TOKEN"),
        (OSError("Error while deserializing header: 14013 bytes"), "org/x cannot be used: OSError: Error while"),
        (torch.OutOfMemoryError("CUDA out of memory."), "org/x does not fit: try model.quantization=4bit"),
    ],
)  # fmt: skip
def test_what_went_wrong_while_loading_gets_its_own_advice(error, advice) -> None:
    with (
        pytest.raises(UserError, match=f"^model.name: {advice}"),
        loading.explained("model.name: org/x"),
    ):
        raise error


def test_a_model_that_is_not_here_is_named_with_its_key() -> None:
    for key, load in {
        "model.name": lambda name: model_module.load_tokenizer(ModelConfig(name=name)),
        "lora.adapter": lambda name: model_module.add_adapters(Mock(), LoraConfig(adapter=name)),
    }.items():
        with pytest.raises(UserError, match=f"^{key}: org/away is not on this machine"):
            load("org/away")


def test_weights_that_the_config_asks_for_and_nobody_saved_are_not_made_up(
    saved_model: Path, make_model, tmp_path
) -> None:
    folder = shutil.copytree(saved_model, tmp_path / "deeper")
    described = json.loads((folder / "config.json").read_text())
    layers = described["num_hidden_layers"] + 1
    (folder / "config.json").write_text(json.dumps(described | {"num_hidden_layers": layers}))
    with pytest.raises(UserError, match=r"9 weights that its config.json asks for are missing"):
        make_model(name=str(folder))


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


OTHER_BASES = {
    "wider": {"hidden_size": 96, "head_dim": 24},
    "shallower": {"num_hidden_layers": 1},
    "deeper": {"num_hidden_layers": 3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "mistral": {},  # layers of the same names and shapes
}


@pytest.mark.parametrize("kind", OTHER_BASES)
def test_an_adapter_of_another_model_is_refused(
    tune, saved_model: Path, tokenizer, tmp_path: Path, kind: str
) -> None:
    adapter, other = tmp_path / "adapter", tmp_path / kind
    # Of fewer than 20 layers PEFT would save the whole names, and adapt no others.
    save_model(tune(target_modules=["q_proj"]), tokenizer, adapter, torch.bfloat16)
    config = AutoConfig.from_pretrained(saved_model, **OTHER_BASES[kind])
    if kind == "gpt2":
        config = AutoConfig.for_model(kind, vocab_size=512, **OTHER_BASES[kind])
    elif kind == "mistral":
        described = config.to_dict() | {"model_type": kind, "architectures": None}
        config = AutoConfig.for_model(**described)
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(UserError, match=f"^{adapter} was made for another model than {other}"):
        load_trained(find_trained(str(adapter), str(other)), CPU)
    with pytest.raises(UserError, match=f"^lora.adapter: {adapter} was made for another model"):
        tune(name=other, adapter=str(adapter))


def test_adapters_of_other_kinds_cannot_be_trained_here(tune, make_model, tmp_path: Path) -> None:
    peft.get_peft_model(make_model(), peft.IA3Config()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^lora.adapter: .* a PeftType.IA3 adapter; only LoRA"):
        tune(adapter=str(tmp_path))


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
    head = find_plain_head(model, CPU, torch.bfloat16)
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


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])  # whose embeddings have other names
def test_new_tokens_are_refused_with_the_way_out(kind: str, tokenizer, tmp_path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<mine>"])
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path)

    def build(*whole: str):
        lora = LoraConfig(r=4, modules_to_save=[*whole] or None)
        return build_model(ModelConfig(name=str(tmp_path)), lora, more, CPU, torch.float32)

    with pytest.raises(UserError, match="but the model only") as refusal:
        build()
    *_, advice = str(refusal.value).partition("lora.modules_to_save=")
    base.resize_token_embeddings(len(more))
    base.save_pretrained(tmp_path)
    model = build(*advice.strip("[]").split(","))
    shapes = [p.shape for n, p in model.named_parameters() if "modules_to_save" in n]
    assert shapes == [(len(more), 32)] * 2


def test_what_cannot_be_saved_is_refused_before_the_first_step(
    tmp_path: Path, refused, monkeypatch
) -> None:
    def refuse(self, *_, **__):
        raise ValueError("a value\nthat the library refuses")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    arguments = [SMOKE, f"output_dir={tmp_path / 'run'}", "device=cpu", "tracking.enabled=false"]
    (line,) = refused(scripts.train.main, *arguments)
    assert line.endswith("cannot be used: ValueError: a value")
    assert not (tmp_path / "run").exists()


TABLES = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]],
                "max_position_embeddings": 64},
}  # fmt: skip
COMPUTED = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "xglm": {"d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 64},
}


@pytest.mark.parametrize("kind", [*TABLES, *COMPUTED])
def test_documents_beyond_a_table_of_positions_are_refused_before_loading(
    kind: str, tmp_path: Path
) -> None:
    sizes = TABLES.get(kind) or {**COMPUTED[kind], "max_position_embeddings": 64}
    AutoConfig.for_model(kind, vocab_size=512, **sizes).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    check_positions(config, 64)
    if kind in COMPUTED:
        check_positions(config, 128)
        return
    with pytest.raises(UserError, match=r"data.max_length: 65 is more than the 64 positions"):
        check_positions(config, 65)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises((IndexError, RuntimeError)):  # what the refusal is for
        model(torch.ones(1, 70, dtype=torch.long), use_cache=False)
