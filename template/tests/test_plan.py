"""The plan of the memory is what the step really holds, and a script says what follows from it."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import scripts.plan
from conftest import ROOT, SMOKE, metrics, packed
from src.config import Config, DataConfig, ModelConfig, load_config
from src.data.batching import full_batch
from src.data.dataset import load_tokens
from src.models.adapters import without_input_casts
from src.models.model import load_tokenizer
from src.training.loss import CHUNK
from src.training.optimizer import make_optimizer
from src.training.plan import (
    OVERHEAD,
    Tracker,
    build,
    cheapest_that_fits,
    largest_batch,
    measure_step,
    plan,
    plan_batch,
)
from src.training.speed import count_flops
from src.training.trainer import as_objective, train_step
from src.utils.errors import UserError
from src.utils.memory import GIB

CPU = torch.device("cpu")
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256,
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
CHECKPOINTING = "model.gradient_checkpointing=true"
NO_CHECKPOINTING = "model.gradient_checkpointing=false"


def configured(*overrides: str) -> Config:
    return load_config(SMOKE, [*overrides])[0]


@pytest.fixture
def llama(tmp_path: Path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    model = [f"model.name={tmp_path}", "model.init=pretrained"]
    return [*model, "data.max_length=1024", "training.batch_size=8"]


@pytest.mark.slow  # seconds each
@pytest.mark.parametrize(
    ("options", "weights", "peak"),
    [
        (["lora.r=16"], 15.11, 62.37),
        (["lora.r=16", CHECKPOINTING], 15.11, 19.41),
        (["lora.r=16", "model.quantization=4bit"], 5.47, 52.73),
        (["lora.r=16", "model.quantization=4bit", CHECKPOINTING], 5.47, 9.70),
        (["lora=null", CHECKPOINTING], 29.92, 119.9),
    ],
)
def test_eight_billion_parameters_need_what_a_whole_trial_needed(
    llama, options: list[str], weights: float, peak: float
) -> None:
    # Figures of an earlier trial of all 32 layers, with other code; the overhead is on top.
    planned = plan(configured(*llama, *options))
    assert planned.weights == pytest.approx(weights, rel=0.002)
    assert planned.peak_gib - planned.overhead == pytest.approx(peak, rel=0.005)


SIZES = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
DENSE_FIRST = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [0, 1, 2],
}
FULL = ["lora=null", CHECKPOINTING]
LORA = ["lora.r=4", CHECKPOINTING, "training.gradient_accumulation_steps=2"]
QLORA = ["lora.r=4", "model.quantization=4bit"]


@pytest.mark.parametrize(
    ("model_type", "sizes", "options"),
    [
        ("llama", {"num_hidden_layers": 7}, FULL),
        ("llama", {"num_hidden_layers": 7}, [*QLORA, NO_CHECKPOINTING]),
        ("llama", {"num_hidden_layers": 7}, [*QLORA, CHECKPOINTING]),
        ("gpt2", {"n_embd": 64, "n_layer": 7, "n_head": 4}, LORA),
        ("gemma2", {"sliding_window": 16, "num_hidden_layers": 12}, FULL),
        ("gemma2", {"sliding_window": 16, "num_hidden_layers": 12}, LORA),
        ("qwen3_moe", {**DENSE_FIRST, "num_hidden_layers": 12}, FULL),
        ("qwen3_moe", {**DENSE_FIRST, "num_hidden_layers": 12}, [*QLORA, NO_CHECKPOINTING]),
    ],
)
def test_a_few_layers_tell_what_the_whole_stack_needs(
    tmp_path, model_type: str, sizes: dict, options: list[str]
) -> None:
    AutoConfig.for_model(model_type, **SIZES | sizes).save_pretrained(tmp_path)
    model = [f"model.name={tmp_path}", "model.init=pretrained", "data.max_length=64"]
    config, dtype = configured(*model, *options), torch.bfloat16
    step = (full_batch(4, 64, packing=True, labelled=0.5), "eager", CHUNK)
    *parts, first, second = measure_step(build(config, dtype), config, dtype, *step) / GIB
    planned = plan_batch(config, dtype, *step)
    assert [planned.weights, planned.gradients, planned.moments] == pytest.approx(parts)
    assert planned.peak_gib - OVERHEAD == pytest.approx(max(first, second), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"lora": True},
        {"lora": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_what_is_counted_without_data_is_what_lives_with_it(
    make_model, data, saved_model, options: dict, dtype: torch.dtype
) -> None:
    """Two steps on real tensors and one on fake ones, in an attention that both can run."""
    model = make_model(dtype=dtype, **options).train()
    model.set_attn_implementation("sdpa")
    batch = packed(data, [0, 1, 2, 3])
    objective = as_objective(model, CPU, dtype)
    optimizer = make_optimizer(model, configured().training)
    tracker = Tracker()
    with without_input_casts(model), tracker:
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.count(tensor)
        for _ in range(2):
            tracker.peaks = [0, 0]
            train_step(objective, [batch], optimizer, None, CPU, max_grad_norm=1.0, dtype=dtype)
    overrides = [f"model.name={saved_model}", "model.init=pretrained", "data.max_length=64"]
    if options.get("lora"):
        overrides += ["lora.r=4", "lora.alpha=8"]
    overrides += [f"model.gradient_checkpointing={'gradient_checkpointing' in options}".lower()]
    config = configured(*overrides)
    planned = plan_batch(config, dtype, batch, attention="sdpa", chunk=objective.head.chunk)
    peak = planned.peak_gib - planned.overhead
    assert peak == pytest.approx(max(tracker.peaks) / GIB, rel=0.1)


@pytest.fixture
def two_layers(llama, tmp_path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 2}))
    return [*llama, "lora.r=16"]


def printed(capsys, *arguments: str) -> str:
    scripts.plan.main([SMOKE, *arguments])
    return capsys.readouterr().out


def test_the_largest_batch_fits_and_a_larger_one_does_not(two_layers) -> None:
    config = configured(*two_layers, NO_CHECKPOINTING)
    assert largest_batch(config, plan(config).peak_gib - 0.1) == 7
    double = plan(configured(*two_layers, NO_CHECKPOINTING, "training.batch_size=19")).peak_gib
    assert [largest_batch(config, double + more) for more in (-0.01, 0.01)] == [18, 19]


@pytest.mark.parametrize(
    ("gib", "keys"),
    [(7, CHECKPOINTING), (4.6, f"{CHECKPOINTING} training.batch_size=1")],
)
def test_the_cheapest_change_that_fits_is_planned_before_it_is_advised(
    two_layers, gib: float, keys: str
) -> None:
    change = cheapest_that_fits(configured(*two_layers), gib)
    assert change
    assert set(keys.split()) <= set(change[0].split())
    assert change[1] <= gib
    assert plan(configured(*two_layers, *change[0].split())).peak_gib == change[1]


def test_what_cannot_be_planned_is_one_line(saved_model, refused) -> None:
    model = [f"model.name={saved_model}", "model.init=pretrained", "lora.r=4"]
    (line,) = refused(scripts.plan.main, SMOKE, *model, "model.quantization=8bit")
    assert line.startswith("8-bit weights cannot be planned; plan 4bit")


def test_where_nothing_fits_nothing_is_advised(tmp_path) -> None:
    AutoConfig.from_pretrained(ROOT / "configs/tiny", num_hidden_layers=1).save_pretrained(tmp_path)
    config = configured(f"model.name={tmp_path}", "data.max_length=32")
    assert cheapest_that_fits(config, 0.5) is None


def test_fp32_needs_twice_the_memory_of_bf16(saved_model) -> None:
    options = [f"model.name={saved_model}", "model.init=pretrained", "lora.r=1"]
    half, whole = (plan(configured(*options, f"model.dtype={kind}")) for kind in ("bf16", "fp32"))
    assert whole.weights == pytest.approx(2 * half.weights, rel=0.1)
    assert whole.activations > 1.5 * half.activations


def test_a_model_whose_attention_has_dropout_is_planned_too(tmp_path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.1}
    AutoConfig.for_model("gpt2", vocab_size=512, **sizes).save_pretrained(tmp_path)
    model = [f"model.name={tmp_path}", "model.init=pretrained", "lora.r=4"]
    assert plan(configured(*model, "data.max_length=64")).activations > 0
    with pytest.raises(UserError, match=r"data.max_length: 128 is more than the 64 positions"):
        plan(configured(*model))


def test_the_script_says_what_fits_and_what_would_fit(two_layers, capsys) -> None:
    config = [*two_layers, NO_CHECKPOINTING]
    page = printed(capsys, *config, "--gpu", "80")
    gib = [float(size) for size in re.findall(r"^\w+ +([\d.]+) GiB$", page, re.MULTILINE)]
    assert gib[-1] == pytest.approx(sum(gib[:-1]), abs=0.05)
    assert re.search(r"^fits in 80 GiB; training\.batch_size=\d+ is the largest", page, re.M)
    assert "steps and hours are not known: model.name" in page, "without a tokenizer"
    page = printed(capsys, *config, "--gpu", "4.7")
    assert "does not fit in 4.7 GiB; no training.batch_size does" in page
    assert re.search(rf"try {CHECKPOINTING} .* GiB, as planned with it", page)


def test_the_script_says_what_auto_will_do(two_layers, capsys) -> None:
    roomy, tight = printed(capsys, *two_layers), printed(capsys, *two_layers, "--gpu", "7")
    assert "model.gradient_checkpointing=auto: planned with no layer recomputed" in roomy
    assert "model.gradient_checkpointing=auto: planned with every layer recomputed" in tight
    assert "model.compile=auto: compiled layers take less" in tight
    written = printed(capsys, *two_layers, CHECKPOINTING, "model.compile=false")
    assert written.splitlines()[:6] == tight.splitlines()[:6]
    assert "=auto" not in written


def test_steps_tokens_and_hours_of_the_run_are_those_that_training_counts(smoke, capsys) -> None:
    last = metrics(smoke)[-1]
    page = printed(capsys, "--gpu", "h100", "--mfu", "1e-6")
    assert "training.batch_size=1024 fits; nothing larger was tried" in page
    assert f"{last['step']:,} steps, {last['tokens']:,} tokens; " in page
    # As mfu was counted: the FLOPs of a token are those of the run that trained.
    model = AutoModelForCausalLM.from_pretrained(smoke / "final")
    rows = load_tokens("data/sample.jsonl", load_tokenizer(ModelConfig(name="configs/tiny")),
                       DataConfig(train="x", max_length=128))  # fmt: skip
    token, label = count_flops(model, rows.lengths)
    flops = 40 * (token * rows.lengths.sum() + label * rows.facts.labelled_tokens)
    hours = re.search(r"tokens; ([\d.]+) hours at", page)
    assert hours
    assert float(hours[1]) == pytest.approx(flops / (1e-6 * 989e12) / 3600, rel=0.01)
    limited = printed(capsys, "training.max_steps=8").splitlines()[-1]
    assert limited == f"8 steps, {last['tokens'] // 20:,} tokens"


def test_a_gpu_that_nobody_knows_is_refused(refused) -> None:
    assert "--gpu big: neither a size" in refused(scripts.plan.main, SMOKE, "--gpu", "big")[0]
    assert "unknown key" in refused(scripts.plan.main, SMOKE, "lora.rr=1")[0]
