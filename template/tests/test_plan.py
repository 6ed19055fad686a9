"""The plan of the memory is what the step really holds, and a script says what follows from it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import scripts.plan
from conftest import ROOT, SMOKE, metrics, packed
from src.config import DataConfig, ModelConfig, load_config
from src.data.dataset import load_tokens
from src.models.adapters import without_input_casts
from src.models.model import load_tokenizer
from src.training import plan as plan_module
from src.training.optimizer import make_optimizer
from src.training.plan import Tracker, cheapest_that_fits, plan
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
        (["lora.r=16", "model.gradient_checkpointing=true"], 15.11, 19.41),
        (["lora.r=16", "model.quantization=4bit"], 5.47, 52.73),
        (["lora.r=16", "model.quantization=4bit", "model.gradient_checkpointing=true"], 5.47, 9.70),
        (["lora=null", "model.gradient_checkpointing=true"], 29.92, 119.9),
    ],
)
def test_eight_billion_parameters_take_what_was_found_before(
    llama, options: list[str], weights: float, peak: float
) -> None:
    # Figures of an earlier trial with code of its own; the overhead is on top.
    found = plan(load_config(SMOKE, [*llama, *options])[0])
    assert found.weights == pytest.approx(weights, rel=0.002)
    assert found.peak_gib - found.overhead == pytest.approx(peak, rel=0.005)


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
    """Two steps on real tensors and on fake ones, in an attention that both can walk."""
    model = make_model(dtype=dtype, **options).train()
    model.set_attn_implementation("sdpa")
    batch = packed(data, [0, 1, 2, 3])
    objective = as_objective(model, CPU, dtype)
    optimizer = make_optimizer(model, load_config(SMOKE)[0].training)
    tracker = Tracker()
    with without_input_casts(model), tracker:
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.count(tensor)
        for _ in range(2):
            tracker.peak = tracker.now
            train_step(objective, [batch], optimizer, None, CPU, max_grad_norm=1.0, dtype=dtype)
    overrides = [f"model.name={saved_model}", "model.init=pretrained", "data.max_length=64"]
    if options.get("lora"):
        overrides += ["lora.r=4", "lora.alpha=8"]
    overrides += [f"model.gradient_checkpointing={'gradient_checkpointing' in options}".lower()]
    config = load_config(SMOKE, overrides)[0]
    walked = plan_module.walk(config, dtype, batch, attention="sdpa", chunk=objective.head.chunk)
    assert walked.peak_gib - walked.overhead == pytest.approx(tracker.peak / GIB, rel=0.1)


@pytest.fixture
def two_layers(llama, tmp_path) -> list[str]:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 2}))
    return [SMOKE, *llama, "lora.r=16"]


def planned(capsys, *arguments: str) -> dict:
    scripts.plan.main([*arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_script_says_what_fits(two_layers, capsys) -> None:
    two_layers.append("model.gradient_checkpointing=false")
    found = planned(capsys, *two_layers)
    parts = ("weights", "gradients", "moments", "activations", "overhead")
    assert found["peak_gib"] == pytest.approx(sum(found[part] for part in parts), abs=0.01)
    for room, fits, size in ((1.0, True, 8), (-0.1, False, 7)):
        told = planned(capsys, *two_layers, "--gpu", f"{found['peak_gib'] + room}GB")
        assert told["fits"] == fits
        assert told["largest_batch_size"] >= size if fits else told["largest_batch_size"] == size


@pytest.mark.parametrize(
    ("gib", "keys"),
    [
        (7, "model.gradient_checkpointing=true"),
        (4.6, "model.gradient_checkpointing=true training.batch_size=1"),
    ],
)
def test_the_cheapest_change_that_fits_is_planned_before_it_is_told(
    two_layers, gib: float, keys: str
) -> None:
    found = cheapest_that_fits(load_config(two_layers[0], two_layers[1:])[0], gib)
    assert found
    assert set(keys.split()) <= set(found[0].split())
    assert found[1] <= gib
    again = plan(load_config(two_layers[0], [*two_layers[1:], *found[0].split()])[0])
    assert again.peak_gib == found[1]


def test_fp32_takes_twice_the_memory_of_bf16(saved_model, capsys) -> None:
    options = [SMOKE, f"model.name={saved_model}", "model.init=pretrained", "lora.r=1"]
    half, whole = (planned(capsys, *options, f"model.dtype={kind}") for kind in ("bf16", "fp32"))
    assert whole["weights"] == pytest.approx(2 * half["weights"], abs=1e-3) != 0
    assert whole["activations"] > 1.5 * half["activations"]


def test_a_model_whose_attention_has_dropout_is_planned_too(tmp_path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.1}
    AutoConfig.for_model("gpt2", vocab_size=512, **sizes).save_pretrained(tmp_path)
    model = [f"model.name={tmp_path}", "model.init=pretrained", "lora.r=4"]
    assert plan(load_config(SMOKE, [*model, "data.max_length=64"])[0]).activations > 0
    with pytest.raises(UserError, match=r"data.max_length: 128 is more than the 64 positions"):
        plan(load_config(SMOKE, model)[0])


def test_where_nothing_fits_nothing_is_advised(tmp_path) -> None:
    AutoConfig.from_pretrained(ROOT / "configs/tiny", num_hidden_layers=1).save_pretrained(tmp_path)
    small = [f"model.name={tmp_path}", "data.max_length=32"]
    assert cheapest_that_fits(load_config(SMOKE, small)[0], 0.5) is None


def test_the_script_says_what_would_fit(two_layers, capsys) -> None:
    scripts.plan.main([*two_layers, "model.gradient_checkpointing=false", "--gpu", "4.7"])
    shown = capsys.readouterr().out
    assert "does not fit in 4.7 GiB; no training.batch_size does" in shown
    assert "try model.gradient_checkpointing=true" in shown
    assert "as planned with it" in shown


def test_auto_is_planned_with_recomputed_layers_where_it_needs_them(two_layers, capsys) -> None:
    roomy, tight = (planned(capsys, *two_layers, "--gpu", gib) for gib in ("80", "7"))
    assert (roomy["fits"], tight["fits"]) == (True, True)
    assert ("recomputed" in roomy, "recomputed" in tight) == (False, True)
    true = planned(capsys, *two_layers, "model.gradient_checkpointing=true", "--gpu", "7")
    assert tight["peak_gib"] == true["peak_gib"] < roomy["peak_gib"]
    assert tight["largest_batch_size"] == true["largest_batch_size"]


def test_steps_tokens_and_hours_of_the_run_are_those_that_training_counts(
    smoke, capsys, two_layers
) -> None:
    last = metrics(smoke)[-1]
    found = planned(capsys, SMOKE, "--gpu", "h100", "--mfu", "0.5")
    assert (found["steps"], found["tokens"]) == (last["step"], last["tokens"])
    # As mfu was counted: the FLOPs of a token are those of the run that trained.
    model = AutoModelForCausalLM.from_pretrained(smoke / "final")
    rows = load_tokens("data/sample.jsonl", load_tokenizer(ModelConfig(name="configs/tiny")),
                       DataConfig(train="x", max_length=128))  # fmt: skip
    token, label = count_flops(model, rows.lengths)
    flops = 40 * (token * rows.lengths.sum() + label * rows.facts.labelled_tokens)
    assert found["hours"] == pytest.approx(flops / (0.5 * 989e12) / 3600, rel=0.01)
    limited = planned(capsys, SMOKE, "training.max_steps=8")
    assert (limited["steps"], limited["tokens"]) == (8, last["tokens"] // 20)
    assert "hours" not in limited
    assert "not_counted" in planned(capsys, *two_layers), "without a tokenizer"


def test_a_gpu_that_nobody_knows_is_refused(refused) -> None:
    assert "--gpu big: neither a size" in refused(scripts.plan.main, SMOKE, "--gpu", "big")[0]
    assert "unknown key" in refused(scripts.plan.main, SMOKE, "lora.rr=1")[0]
