"""The plan of the memory is what the step really holds, and a script says what follows from it."""

import json
import re
from pathlib import Path

import pytest
import torch

import scripts.plan
from conftest import SMOKE, tokens
from src.config import Config, load_config
from src.data.batching import full_batch
from src.models.adapters import without_input_casts
from src.training import plan as plan_module
from src.training.loss import CHUNK, Objective
from src.training.optimizer import make_optimizer
from src.training.plan import (
    Plan,
    Tracker,
    build,
    cheapest_that_fits,
    cost,
    largest_batch,
    measure_step,
    plan,
)
from src.training.speed import count_flops
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
        return load_config(SMOKE, [*model, *overrides])[0]

    return make


@pytest.mark.slow  # seconds each
@pytest.mark.parametrize(
    ("options", "weights", "peak"),
    [
        (["lora.r=16", NO_CHECKPOINTING], 15.11, 62.37),
        (["lora.r=16", CHECKPOINTING], 15.11, 19.41),
        (["lora.r=16", "model.quantization=4bit", NO_CHECKPOINTING], 5.47, 52.73),
        (["lora.r=16", "model.quantization=4bit", CHECKPOINTING], 5.47, 9.70),
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
    assert planned.peak_gib - planned.overhead == pytest.approx(peak, rel=0.005)


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
    whole = build(config, list(range(sizes.get("n_layer") or sizes["num_hidden_layers"])))
    *parts, first, second = measure_step(whole, config, "eager") / GIB
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
    head = as_objective(model, CPU, kind).head._replace(chunk=CHUNK)
    overrides = [f"model.name={saved_model}", "model.init=pretrained", "data.max_length=64"]
    overrides += ["lora.r=4", "lora.alpha=8"] * lora + ["model.attention=sdpa"]
    overrides += [f"model.dtype={dtype}", CHECKPOINTING if checkpointing else NO_CHECKPOINTING]
    config, _ = load_config(SMOKE, overrides)
    batch = full_batch(config.training.batch_size, 64, packing=True, labelled=0.5)
    optimizer, tracker = make_optimizer(model, config.training), Tracker()
    with without_input_casts(model), tracker:
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.count(tensor)
        for _ in range(2):
            tracker.peaks = [0, 0]
            train_step(
                Objective(model, head), [batch], optimizer, None, CPU, max_grad_norm=1.0, dtype=kind
            )
    planned = plan(config)
    peak = planned.peak_gib - planned.overhead
    assert peak == pytest.approx(max(tracker.peaks) / GIB, rel=0.1)


def test_dropout_and_attention_are_planned_as_a_gpu_computes_them(configure) -> None:
    options, one = ["lora.r=4", "data.max_length=64"], GPT2 | {"n_layer": 1}
    dropout, without = one | {"attn_pdrop": 0.1}, one | {"attn_pdrop": 0.0}
    kernel = plan(configure(without, *options))
    sdpa = plan(configure(without, *options, "model.attention=sdpa"))
    eager = plan(configure(without, *options, "model.attention=eager"))
    assert plan(configure(dropout, *options)) == sdpa, "no probabilities are kept for dropout"
    assert kernel.activations < sdpa.activations < eager.activations
    whole = plan(configure(without, *options, "model.dtype=fp32"))
    assert whole.weights == pytest.approx(2 * kernel.weights, rel=0.1)
    assert whole.activations > kernel.activations
    with pytest.raises(UserError, match=r"data.max_length: 128 is more than the 64 positions"):
        plan(configure(one, *options, "data.max_length=128"))


# --- what follows from a plan, on a model whose peak is a formula


@pytest.fixture
def formula(monkeypatch) -> None:
    """A step takes 2 GiB, and a row 1; 0.25 where layers are recomputed."""

    def planned(config: Config) -> Plan:
        row = 0.25 if config.model.gradient_checkpointing is True else 1.0
        rows = config.training.batch_size * config.data.max_length / 128
        return Plan(1.0, 0.0, 0.0, row * rows)

    monkeypatch.setattr(plan_module, "plan", planned)


def configured(*overrides: str) -> Config:
    return load_config(SMOKE, [*overrides])[0]


@pytest.mark.usefixtures("formula")
def test_the_largest_batch_fits_and_a_larger_one_does_not() -> None:
    config = configured(NO_CHECKPOINTING)
    assert [largest_batch(config, gib) for gib in (2.9, 20.99, 21, 9999)] == [0, 18, 19, 1024]
    assert largest_batch(configured(), 3) == 4, "auto can recompute every layer"


@pytest.mark.usefixtures("formula")
def test_the_cheapest_change_that_fits_is_advised() -> None:
    config = configured("lora.r=16", "model.init=pretrained", NO_CHECKPOINTING)
    assert cheapest_that_fits(config, 3) == (CHECKPOINTING, 3.0)
    keys, peak = cheapest_that_fits(config, 2.3) or ("", 0)
    assert {CHECKPOINTING, "training.batch_size=1"} <= set(keys.split())
    assert peak == 2.25
    assert cheapest_that_fits(config, 1.0) is None


# --- the script


def printed(capsys, *arguments: str) -> str:
    scripts.plan.main([SMOKE, *arguments])
    return capsys.readouterr().out


@pytest.mark.usefixtures("formula")
def test_the_script_says_what_fits_what_would_fit_and_what_auto_will_do(configure, capsys) -> None:
    page = printed(capsys, "--gpu", "7")
    gib = [float(size) for size in re.findall(r"^\w+ +([\d.]+) GiB$", page, re.MULTILINE)]
    assert gib == [1, 0, 0, 4, 1, 6]
    assert "model.gradient_checkpointing=auto: planned with no layer recomputed" in page
    assert "model.compile=auto: compiled layers take less" in page
    assert "fits in 7 GiB; training.batch_size=20 is the largest that does" in page
    assert "=auto: planned with every layer recomputed" in printed(capsys, "--gpu", "5")
    page = printed(capsys, "--gpu", "h100", NO_CHECKPOINTING, "model.compile=false")
    assert "fits in 79 GiB; training.batch_size=77 is the largest that does" in page
    assert "auto" not in page
    page = printed(capsys, "--gpu", "2.2")
    assert "does not fit in 2.2 GiB; no training.batch_size does" in page
    assert re.search(r"^try .* data.max_length=64: 2\.12 GiB, as planned with it", page, re.M)
    page = printed(capsys, "--gpu", "9999gib")
    assert "fits in 9999 GiB; training.batch_size=1024 fits; nothing larger was tried" in page
    page = printed(capsys, f"model.name={configure(LLAMA).model.name}")
    assert "steps and hours are not known: model.name" in page, "without a tokenizer"


@pytest.mark.usefixtures("formula")
def test_steps_tokens_and_hours_of_the_run_are_those_that_training_counts(
    make_model, tokenizer, capsys
) -> None:
    page = printed(capsys, "--gpu", "h100", "--mfu", "1e-6")
    # Forty epochs in steps of one batch; the FLOPs of a token are those that mfu is counted with.
    rows = tokens("data/sample.jsonl", tokenizer, max_length=128)
    token, label = count_flops(make_model(), rows.lengths)
    all_tokens = rows.lengths.sum()
    flops = 40 * (token * all_tokens + label * rows.facts.labelled_tokens)
    counted = re.search(r"^(\d+) steps, ([\d,]+) tokens; ([\d.]+) hours at", page, re.M)
    assert counted
    assert int(counted[2].replace(",", "")) == 40 * all_tokens
    assert float(counted[3]) == pytest.approx(flops / (1e-6 * 989e12) / 3600, rel=0.01)
    steps, seen, _ = cost(configured("training.max_steps=8"), rows)
    assert (steps, seen) == (8, 40 * all_tokens * 8 // int(counted[1]))


def test_help_shows_usage_and_defaults_and_unknown_words_are_refused(capsys, refused) -> None:
    with pytest.raises(SystemExit):
        scripts.plan.main(["--help"])
    page = " ".join(capsys.readouterr().out.split())
    assert "[CONFIG] [key=value ...] [--gpu GPU] [--mfu SHARE]" in page
    for default in ("configs/train.yaml", "the GPU of this machine", "0.4"):
        assert f"(default: {default})" in page
    assert "--gpu big: neither a size" in refused(scripts.plan.main, SMOKE, "--gpu", "big")[0]
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
