"""The plan of the memory is what a step really holds, and a few layers tell it of all."""

import json
from pathlib import Path

import pytest
import torch

import scripts.plan
from conftest import SMOKE
from src.config import Config, load_config
from src.data.batching import full_batch
from src.models.head import CHUNK
from src.training import plan as plan_module
from src.training.optimizer import make_optimizer
from src.training.plan import ByteCounter, Plan, build, measure_step, plan
from src.training.trainer import as_objective, train_step
from src.utils.errors import UserError
from src.utils.memory import GIB

CPU = torch.device("cpu")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256,
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
SIZES = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
CHECKPOINTING = "model.gradient_checkpointing=true"
NO_CHECKPOINTING = "model.gradient_checkpointing=false"


@pytest.fixture
def configure(tmp_path: Path):
    """A config of a model of this architecture: `configure({...}, "lora.r=4", …)`."""

    def make(sizes: dict, *overrides: str) -> Config:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | sizes))
        model = [f"model.name={tmp_path}", "model.init=pretrained", "data.max_length=64"]
        return load_config(SMOKE, [*model, *overrides])

    return make


@pytest.mark.parametrize(
    ("options", "weights", "peak"),
    [
        (["lora.r=16", CHECKPOINTING], 15.11, 19.41),
        (["lora.r=16", "model.quantization=4bit", NO_CHECKPOINTING], 5.47, 52.73),
        (["lora=null", CHECKPOINTING], 29.92, 119.9),
    ],
)
def test_eight_billion_parameters_need_what_a_whole_trial_needed(
    configure, options: list[str], weights: float, peak: float
) -> None:
    # Figures of an earlier trial of all 32 layers, with other code; the overhead is on top.
    batch = ["data.max_length=1024", "training.batch_size=8"]
    planned = plan(configure(LLAMA_8B, *batch, *options))
    assert planned.weights == pytest.approx(weights, rel=0.002)
    assert planned.peak_gib - planned.overhead == pytest.approx(peak, rel=0.01)


DENSE_FIRST = {
    "model_type": "qwen3_moe", "num_hidden_layers": 7, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 32, "mlp_only_layers": [0, 1],
}  # fmt: skip
GEMMA2 = {"model_type": "gemma2", "sliding_window": 16, "num_hidden_layers": 8}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
LLAMA = {"num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (LLAMA, ["lora.r=4", "model.quantization=4bit", NO_CHECKPOINTING]),
        (GPT2, ["lora.r=4", CHECKPOINTING, "training.gradient_accumulation_steps=2"]),
        (GEMMA2, [NO_CHECKPOINTING]),
        (DENSE_FIRST, [CHECKPOINTING]),
    ],
)
def test_a_few_layers_tell_what_the_whole_stack_needs(
    configure, sizes: dict, options: list[str]
) -> None:
    config = configure(sizes, "model.attention=eager", *options)
    *parts, first, second = measure_step(build(config), config, "eager") / GIB
    planned = plan(config)
    assert [planned.weights, planned.gradients, planned.moments] == pytest.approx(parts)
    assert planned.peak_gib - planned.overhead == pytest.approx(max(first, second), rel=0.01)


@pytest.mark.parametrize(
    ("lora", "checkpointing", "dtype"),
    [(True, True, "bf16"), (True, False, "bf16"), (False, False, "bf16"), (False, True, "fp32")],
)
def test_what_is_counted_without_data_is_what_lives_with_it(
    make_model, saved_model, lora: bool, checkpointing: bool, dtype: str
) -> None:
    """Two steps on real tensors and one on fake ones, in an attention that both can run."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = make_model(lora, dtype=kind, gradient_checkpointing=checkpointing)
    model.set_attn_implementation("sdpa")
    objective = as_objective(model, kind)
    objective.head = objective.head._replace(chunk=CHUNK)
    overrides = [f"model.name={saved_model}", "model.init=pretrained", "data.max_length=64"]
    overrides += ["lora.r=4", "lora.alpha=8"] * lora + ["model.attention=sdpa"]
    overrides += [f"model.dtype={dtype}", CHECKPOINTING if checkpointing else NO_CHECKPOINTING]
    config = load_config(SMOKE, overrides)
    batch = full_batch(config.training.batch_size, 64, packing=True, labelled=0.5)
    optimizer, tracker = make_optimizer(model, config.training), ByteCounter()
    with tracker:
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.count(tensor)
        for _ in range(2):
            tracker.peaks = [0, 0]
            train_step(objective, [batch], optimizer, None, CPU, max_grad_norm=1.0)
    planned = plan(config)
    peak = planned.peak_gib - planned.overhead
    assert peak == pytest.approx(max(tracker.peaks) / GIB, rel=0.1)


def test_each_attention_is_planned_by_what_it_keeps(configure) -> None:
    options, one = ["lora.r=4", "data.max_length=64"], GPT2 | {"n_layer": 1}
    without = one | {"attn_pdrop": 0.0}
    kernel = plan(configure(without, *options))
    sdpa = plan(configure(without, *options, "model.attention=sdpa"))
    eager = plan(configure(without, *options, "model.attention=eager"))
    assert kernel.activations < sdpa.activations < eager.activations
    whole = plan(configure(without, *options, "model.dtype=fp32"))
    assert whole.weights == pytest.approx(2 * kernel.weights, rel=0.1)
    assert whole.activations > kernel.activations
    with pytest.raises(UserError, match=r"data.max_length: 128 is more than the 64 positions"):
        plan(configure(one, *options, "data.max_length=128"))


def test_help_shows_usage_and_defaults_and_unknown_words_are_refused(capsys, refused) -> None:
    with pytest.raises(SystemExit):
        scripts.plan.main(["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert "[CONFIG] [key=value ...] [--gpu GPU]" in page
    for default in ("configs/train.yaml", "the GPU of this machine"):
        assert f"(default: {default})" in page
    with pytest.raises(SystemExit, match="2"):
        scripts.plan.main([SMOKE, "--gpu", "big"])
    assert "unknown key" in refused(scripts.plan.main, SMOKE, "lora.rr=1")[0]


def test_what_cannot_be_planned_is_one_line(refused, monkeypatch) -> None:
    eight = ["model.init=pretrained", "lora.r=4", "model.quantization=8bit"]
    (line,) = refused(scripts.plan.main, SMOKE, *eight)
    assert line.startswith("8-bit weights cannot be planned; plan 4bit")

    def fail(_: Config) -> Plan:
        raise NotImplementedError("no such operator\nand a long story")

    monkeypatch.setattr(plan_module, "plan", fail)
    (line,) = refused(scripts.plan.main, SMOKE)
    assert line == "configs/tiny cannot be planned: NotImplementedError: no such operator"
