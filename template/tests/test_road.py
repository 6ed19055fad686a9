"""Every road from rows to an exported answer, in the dtypes of a GPU.

A GPU computes in bf16 with fp32 adapters, a CPU by default in fp32, which hides every cast that
is missing. So each road here trains with evaluation and samples, is stopped, resumed, asked in
all ways, evaluated, exported, and asked again.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

import scripts.inference
import scripts.train
from conftest import ROOT, SMOKE, chat, metrics, run_tool
from src.training.signals import StopSignal
from src.utils.errors import Interrupted, RunError

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
EXPERTS = "lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
WHOLE = "lora.modules_to_save=[embed_tokens,lm_head]"
# A base, and what differs from a LoRA in bf16. Each combines what does not touch each other.
ROADS: dict[str, tuple[str, list[str]]] = {
    "lora": ("untied", ["training.patience=3", "training.gradient_accumulation_steps=2"]),
    "4bit dora": ("untied", ["model.quantization=4bit", "lora.dora=true", "lora.dropout=0.1"]),
    "8bit, checkpointing": (
        "tied", ["model.quantization=8bit", WHOLE, "model.gradient_checkpointing=true"],
    ),
    "whole modules": ("untied", [WHOLE, "data.packing=false"]),
    "whole tied modules, offload": (
        "tied", [WHOLE, "model.gradient_checkpointing=true",
                 "model.gradient_checkpointing_offload=true"],
    ),
    "experts": ("experts", [EXPERTS, "lora.rslora=true"]),
    "adapted head": ("tied", ["lora.target_modules=[q_proj,lm_head]"]),
    "adapted embeddings": ("tied", ["lora.target_modules=[q_proj,embed_tokens]"]),
    "full": ("tied", ["lora=null", "data.packing=false", "model.gradient_checkpointing=true"]),
    "full adamw8bit": ("untied", ["lora=null", "training.optimizer=adamw8bit"]),
    "fp16 lora": ("untied", ["model.dtype=fp16", WHOLE]),
    "fp16 8bit": ("untied", ["model.dtype=fp16", "model.quantization=8bit"]),
    "fp16 full adamw8bit": (
        "untied", ["model.dtype=fp16", "lora=null", "training.optimizer=adamw8bit"],
    ),
}  # fmt: skip


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EACH = [
    *(pytest.param(name, "cpu", marks=[pytest.mark.slow] * (name != "lora")) for name in ROADS),
    *(pytest.param(name, "cuda", marks=[pytest.mark.gpu, NEEDS_GPU]) for name in ROADS),
]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Callable[[str], Path]:
    """A folder with a model in bf16, as the hub has them: `base("tied")`."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            config = AutoConfig.from_pretrained(ROOT / "configs/tiny", **SMALL)
            config.tie_word_embeddings = kind == "tied"
            if kind == "experts":
                experts = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
                config = Qwen3MoeConfig(**SMALL, **experts)
            made[kind] = tmp_path_factory.mktemp(kind)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(made[kind])
            tokenizer.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def rows(write_rows) -> str:
    return write_rows(*[chat("why? " * (1 + n % 5), "because " * (1 + n % 3)) for n in range(6)])


def command(base: Path, rows: str, output: Path, *options: str) -> list[str]:
    """The arguments of a run of three steps with all that happens in a long one."""
    lora = [] if "lora=null" in options else ["lora.r=4"]
    return [
        SMOKE, f"output_dir={output}", "device=cpu", "tracking.enabled=false", "model.dtype=bf16",
        f"model.name={base}", "model.init=pretrained", f"data.train={rows}", f"data.eval={rows}",
        "data.max_length=64", "training.batch_size=1", "training.epochs=9", "training.max_steps=3",
        "training.log_every=1", "training.eval_every=1", "training.save_every=1",
        "evaluation.max_length=2", *lora, *options,
    ]  # fmt: skip


def walk_from(run: Path, rows: str, folder: Path, monkeypatch, device: str = "cpu") -> None:
    """Ask what was trained in all ways, evaluate it, export it, and ask the export."""
    short = ["--max-length", "2", "--device", device]
    for model in (run, run / "checkpoints/step-00000003"):
        scripts.inference.main([str(model), "why?", "a much longer question than that", *short])
        evaluated = run_tool("evaluate", str(model), rows, "--samples", "2", *short)
    said = iter(["why?", "and why else?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    scripts.inference.main([str(run), "--chat", *short])
    answers = folder / "answers.jsonl"
    scripts.inference.main([str(run), "--input", rows, "--output", str(answers), *short])
    assert answers.read_text().count("\n") == 6
    if evaluated:
        scores = json.loads((run / "evaluation.json").read_text())["scores"]
        assert scores["model"]["loss"] == pytest.approx(metrics(run)[-1]["eval_loss"], rel=0.02)
    if run_tool("export", str(run), str(folder / "exported")):
        scripts.inference.main([str(folder / "exported"), "why?", *short])


@pytest.mark.parametrize(("name", "device"), EACH)
def test_a_road_leads_to_an_exported_answer(
    name: str, device: str, base, rows: str, tmp_path: Path, monkeypatch
) -> None:
    kind, options = ROADS[name]
    arguments = command(base(kind), rows, tmp_path / "run", *options, f"device={device}")
    asked: list[int] = []
    with monkeypatch.context() as stopped:
        stopped.setattr(StopSignal, "requested", lambda _: len(asked.append(1) or asked) == 2)
        with pytest.raises(Interrupted):
            scripts.train.main(arguments)
    scripts.train.main([*arguments, "training.resume=auto"])
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 for line in lines)
    samples = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    assert len(samples) == 3, "before the first step, and at each evaluation but the stopped one"
    walk_from(tmp_path / "run", rows, tmp_path, monkeypatch, device)


@pytest.mark.slow
def test_a_saved_adapter_goes_on_and_is_proved_in_bf16(base, rows, tmp_path, monkeypatch) -> None:
    first = command(base("untied"), rows, tmp_path / "first", WHOLE)
    scripts.train.main(first)
    adapter = f"lora.adapter={tmp_path / 'first/final'}"
    second = command(base("untied"), rows, tmp_path / "run", adapter, "training.overfit=2")
    with pytest.raises(RunError, match="overfit not passed: row 1 says 'because', the model "):
        scripts.train.main(second)
    walk_from(tmp_path / "run", rows, tmp_path, monkeypatch)
