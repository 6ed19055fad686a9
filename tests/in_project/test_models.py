"""Models of rare kinds, and rare ends of loading, answering and saving."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GPT2Config

import scripts.export
import scripts.train
from conftest import SMOKE
from src.config import ModelConfig
from src.models import generation, loading
from src.models import model as model_module
from src.models.attention import set_attention, varlen_attention
from src.models.generation import generate
from src.models.head import find_plain_head
from src.models.model import check_positions, save_model
from src.trained import find_trained, load_trained
from src.training.loss import summed_loss
from src.utils.environment import load_environment
from src.utils.errors import RunError, UserError
from test_model import one_batch, randomise_adapters

CPU = torch.device("cpu")


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
        head = find_plain_head(model, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16), LiveBytes() as live:
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
        enable = mock.Mock()
        model = SimpleNamespace(device=torch.device(place), activation_checkpointing_enable=enable)
        model_module.checkpoint_layers(cast(Any, model), ModelConfig(name="x", **options))
        assert enable.call_args.kwargs["offload"] is expected


def test_a_model_without_linear_layers_cannot_be_quantized(make_model) -> None:
    config = ModelConfig(name="x", quantization="4bit")  # whose layers bitsandbytes did not replace
    with pytest.raises(UserError, match=r"model.quantization: x has no layer that bitsandbytes"):
        model_module._check_quantized(make_model(), config)


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


OTHER_BASES = {
    "wider": {"hidden_size": 96, "head_dim": 24},
    "shallower": {"num_hidden_layers": 1},
    "deeper": {"num_hidden_layers": 3},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "mistral": {},  # layers of the same names and shapes
}


@pytest.mark.parametrize("kind", OTHER_BASES)
def test_an_adapter_of_another_model_is_refused(
    make_model, saved_model: Path, tokenizer, tmp_path: Path, kind: str
) -> None:
    adapter, other = tmp_path / "adapter", tmp_path / kind
    # Of fewer than 20 layers PEFT would save the whole names, and adapt no others.
    save_model(make_model({"target_modules": ["q_proj"]}), tokenizer, adapter, torch.bfloat16)
    config = AutoConfig.from_pretrained(saved_model, **OTHER_BASES[kind])
    if kind == "gpt2":
        config = AutoConfig.for_model(kind, vocab_size=512, **OTHER_BASES[kind])
    elif kind == "mistral":
        described = config.to_dict() | {"model_type": kind, "architectures": None}
        config = AutoConfig.for_model(**described)
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(UserError, match=f"^{adapter} was made for another base model"):
        load_trained(find_trained(str(adapter), str(other)), CPU)
    with pytest.raises(UserError, match=f"^lora.adapter: {adapter} was made for another base"):
        make_model({"adapter": str(adapter)}, name=str(other))


def test_adapters_of_other_kinds_cannot_be_trained_here(make_model, tmp_path: Path) -> None:
    peft.get_peft_model(make_model(), peft.IA3Config()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^lora.adapter: .* a PeftType.IA3 adapter; only LoRA"):
        make_model({"adapter": str(tmp_path)})


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


SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 64},
}  # fmt: skip


@pytest.mark.parametrize("kind", SIZES)
def test_documents_beyond_a_table_of_positions_are_refused_before_loading(
    kind: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(kind, vocab_size=512, **SIZES[kind]).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    check_positions(config, 64)
    check_positions(ModelConfig(name="configs/tiny"), 100_000)  # computes them
    with pytest.raises(UserError, match=r"data.max_length: 65 is more than the 64 positions of"):
        check_positions(config, 65)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises((IndexError, RuntimeError)):  # what the refusal is for
        model(torch.ones(1, 70, dtype=torch.long), use_cache=False)


def test_a_long_job_gets_the_same_answers_in_few_shapes_and_if_it_cannot_be_compiled(
    make_model, tokenizer, monkeypatch, capsys
) -> None:
    model, shapes = make_model(packing=False).eval(), set()
    prompts = [f"{'why ' * (9 * n)}{n}?" for n in range(11)]
    expected = generate(model, tokenizer, prompts, max_length=4, batch_size=4)
    assert not generation.is_compiled_for(model, 10_000), "a CPU"
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", torch.device("cuda"))
        assert [generation.is_compiled_for(model, n) for n in (256, 10_000)] == [False, True]
        assert not generation.is_compiled_for(model.train(), 10_000)
    monkeypatch.setattr(generation, "is_compiled_for", lambda *_: True)
    model.eval().register_forward_pre_hook(
        lambda _, __, given: shapes.add(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    assert generate(model, tokenizer, prompts, max_length=4, batch_size=4) == expected
    assert shapes == {(4, 128), (4, 256), (4, 1)}
    real = type(model).generate

    def without_compiler(self, *args, cache_implementation=None, **options):
        if cache_implementation:
            raise RuntimeError("no C compiler\nat all")
        return real(self, *args, **options)

    monkeypatch.setattr(type(model), "generate", without_compiler)
    capsys.readouterr()
    assert generate(model, tokenizer, prompts, max_length=4, batch_size=4) == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: answers are not compiled: RuntimeError: no C compiler"


def test_an_answer_ends_where_the_models_positions_do(tokenizer) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = GPT2Config(vocab_size=512, eos_token_id=1, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    asked = len(tokenizer("x " * 10)["input_ids"])
    with mock.patch.object(model, "generate", wraps=model.generate) as complete:
        for length in (256, 4):
            generate(model, tokenizer, {"text": "x " * 10}, max_length=length)
    assert [call.kwargs["max_new_tokens"] for call in complete.call_args_list] == [32 - asked, 4]
    rows = [{"text": "x"}, {"text": "x " * 40, "place": "rows.jsonl:2"}]
    expected = r"rows.jsonl:2: a prompt of \d+ tokens fills the model's 32 positions"
    with pytest.raises(UserError, match=expected):
        generate(model, tokenizer, rows)


def test_a_prompt_that_the_template_refuses_is_named(make_model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    asked = [{"role": "user", "content": "Hi"}]
    for prompt, name in (("Hi", "Hi"), ({"messages": asked, "place": "a.csv:9"}, "a.csv:9")):
        with pytest.raises(UserError, match=f"{name}.*: the chat template refuses it: .*no"):
            generate(make_model(), tokenizer, prompt, max_length=1)


SAMPLING = {"temperature": 0.6, "top_p": 0.9}


BEAMS = {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}


@pytest.mark.parametrize(
    ("lora", "file", "values"),
    [
        ("null", "generation_config.json", {"eos_token_id": 0, "do_sample": False, **SAMPLING}),
        ("{r: 4}", "generation_config.json", BEAMS),
        ("{r: 4}", "config.json", SAMPLING),
    ],
)
def test_a_base_whose_generation_config_transformers_refuses_is_trained_and_saved(
    saved_model: Path, tmp_path: Path, train, lora: str, file: str, values: dict
) -> None:
    base = shutil.copytree(saved_model, tmp_path / "base")
    described = json.loads((base / file).read_text()) | values
    (base / "generation_config.json").unlink()  # else transformers does not read the other's values
    (base / file).write_text(json.dumps(described))
    run = train(
        f"model.name={base}", "model.init=pretrained", f"lora={lora}", "data.eval=null",
        "training.max_steps=1",
    )  # fmt: skip
    scripts.export.main([str(run), str(tmp_path / "exported")])
    for folder in [tmp_path / "exported", *([run / "final"] if lora == "null" else [])]:
        saved = GenerationConfig.from_pretrained(folder)
        assert 1 in cast(list, saved.eos_token_id)
        assert (saved.do_sample, saved.temperature) == (True, 0.6) or "num_beams" in values


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"v": lambda x: x[..., :8]}, "one head dimension"),
        ({k: lambda x: x[..., :12] for k in "qkv"}, "here 12"),
        ({k: lambda x: x.repeat(1, 1, 1, 17) for k in "qkv"}, "here 272"),
        ({"dropout": lambda _: 0.1}, "no dropout"),
        ({"softcap": lambda _: 30.0}, "no cap"),
        ({"s_aux": lambda _: torch.zeros(4)}, "sinks"),
        ({"cu_seq_lens_q": lambda _: None}, "reads packed batches only"),
    ],
)
def test_what_the_cuda_kernels_refuse_is_refused_on_every_device(change, reason) -> None:
    options = dict(zip("qkv", torch.randn(3, 1, 4, 8, 16), strict=True))
    options |= {"cu_seq_lens_q": torch.tensor([0, 8], dtype=torch.int32), "max_length_q": 8}
    options |= {name: make(options.get(name)) for name, make in change.items()}
    q, k, v = (options.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=reason):
        varlen_attention(torch.nn.Identity(), q, k, v, None, **options)


def test_varlen_is_not_tried_on_a_gpu_without_its_kernel(make_model, monkeypatch) -> None:
    model = make_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(UserError, match=r"flash attention needs .* an Ampere GPU"):
        set_attention(model, "varlen", True, torch.float16)


def test_weights_that_the_config_asks_for_and_nobody_saved_are_not_made_up(
    saved_model: Path, make_model, tmp_path
) -> None:
    folder = shutil.copytree(saved_model, tmp_path / "deeper")
    described = json.loads((folder / "config.json").read_text())
    layers = described["num_hidden_layers"] + 1
    (folder / "config.json").write_text(json.dumps(described | {"num_hidden_layers": layers}))
    with pytest.raises(UserError, match=r"9 weights that its config.json asks for are missing"):
        make_model(name=str(folder))


@pytest.fixture(scope="module")
def tuned(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with adapters on the smoke model."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    scripts.train.main([
        SMOKE, "tracking.enabled=false", f"output_dir={folder}", "device=cpu", "lora.r=4",
        f"model.name={smoke / 'final'}", "model.init=pretrained", "training.max_steps=1",
        "evaluation.samples=0",
    ])  # fmt: skip
    return folder


def test_what_cannot_be_exported_is_refused(tuned, tmp_path, refused, smoke: Path) -> None:
    def lines(*options: str) -> list[str]:
        return refused(scripts.export.main, str(run), str(out), *options)

    run, out = tuned, tmp_path / "exported"
    out.mkdir()
    assert lines() == [f"{out}: exists already; nothing is overwritten"]
    out.rmdir()
    base = shutil.copytree(smoke / "final", tmp_path / "base")
    described = json.loads((base / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(described | quantized))
    (line,) = lines("--base", str(base))
    assert "is quantized, and merging would round the adapter away" in line
    narrow = AutoConfig.for_model(**described | {"hidden_size": 64})
    AutoModelForCausalLM.from_config(narrow).save_pretrained(tmp_path / "narrow")
    (line,) = lines("--base", str(tmp_path / "narrow"))
    assert line.endswith("was made for another base model")
    run = shutil.copytree(tuned, tmp_path / "run")
    (run / "final/training_config.yaml").unlink()
    assert lines()[0].startswith(f"{run}: not the result of a finished run")
    run = next((smoke / "checkpoints").iterdir())
    assert lines()[0].startswith(f"{run}: not the result of a finished run")
    assert not out.exists()


def test_a_push_that_fails_leaves_the_export_and_the_command_that_repeats_it(
    tuned, tmp_path
) -> None:
    out = tmp_path / "exported"
    with pytest.raises(RunError) as error:  # the tests are offline
        scripts.export.main([str(tuned), str(out), "--push", "org/name"])
    assert str(error.value).startswith("--push: OfflineModeIsEnabled: ")
    assert str(error.value).endswith(
        f"{out} is whole: `uv run hf upload org/name {out}` repeats it"
    )
    assert (out / "model.safetensors").is_file()
