"""The plan of the memory is what the step really holds, and a script says what follows from it."""

import json
from pathlib import Path

import pytest
import torch

import scripts.plan
from conftest import SMOKE, packed
from src.config import load_config
from src.models.adapters import without_input_casts
from src.training.optimizer import make_optimizer
from src.training.plan import Tracker, plan
from src.training.trainer import as_objective, train_step
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
        (["lora.r=16", "model.quantization=4bit", "model.gradient_checkpointing=true"], 5.47, 9.76),
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
    from src.training import plan as module

    overrides = [f"model.name={saved_model}", "model.init=pretrained", "data.max_length=64"]
    if options.get("lora"):
        overrides += ["lora.r=4", "lora.alpha=8"]
    overrides += [f"model.gradient_checkpointing={'gradient_checkpointing' in options}".lower()]
    config = load_config(SMOKE, overrides)[0]
    walked = module.walk(config, dtype, batch, attention="sdpa", chunk=objective.head.chunk)
    assert walked.peak_gib - walked.overhead == pytest.approx(tracker.peak / GIB, rel=0.1)


def test_the_script_says_what_fits(llama, tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"num_hidden_layers": 2}))
    arguments = [SMOKE, *llama, "lora.r=16"]
    scripts.plan.main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    parts = ("weights", "gradients", "moments", "activations", "overhead")
    assert found["peak_gib"] == pytest.approx(sum(found[part] for part in parts), abs=0.01)
    for room, fits, size in ((1.0, True, 8), (-0.1, False, 7)):
        scripts.plan.main([*arguments, "--gpu", f"{found['peak_gib'] + room}GB", "--json"])
        told = json.loads(capsys.readouterr().out)
        assert told["fits"] == fits
        assert told["largest_batch_size"] >= size if fits else told["largest_batch_size"] == size
    scripts.plan.main([*arguments, "--gpu", "3"])
    shown = capsys.readouterr().out
    assert "does not fit in 3 GiB; none does" in shown
    assert "try model.gradient_checkpointing=true" in shown


def test_a_gpu_that_nobody_knows_is_refused(refused) -> None:
    assert "--gpu big: neither a size" in refused(scripts.plan.main, SMOKE, "--gpu", "big")[0]
    assert "unknown key" in refused(scripts.plan.main, SMOKE, "lora.rr=1")[0]
