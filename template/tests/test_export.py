"""A run becomes one model folder that says the same, or nothing is written."""

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import scripts.export
import scripts.inference
from src.tools import export
from src.utils.errors import RunError


@pytest.fixture
def tune(train, smoke: Path):
    """Train adapters on the smoke model: `tune(lora.r=4, …)`; returns the run's folder."""

    def call(*overrides: str) -> Path:
        return train(
            f"model.name={smoke / 'final'}", "model.init=pretrained", "lora.r=4",
            "training.epochs=2", "training.learning_rate=3e-3", "training.warmup_steps=0",
            "evaluation.samples=0", *overrides,
        )  # fmt: skip

    return call


def answers(model: Path, capsys) -> list[str]:
    capsys.readouterr()
    questions = ["What does LoRA train?", "Say hello.", "What is a batch?"]
    scripts.inference.main([str(model), *questions, "--max-length", "24"])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["lora.dora=true"],
        ["lora.target_modules=[q_proj,lm_head]"],
        ["lora.modules_to_save=[embed_tokens,lm_head]"],
    ],
    ids=["plain", "dora", "adapted head", "whole modules"],
)
def test_the_merged_model_says_what_the_adapter_says(
    tune, tmp_path, capsys, smoke: Path, options: list[str]
) -> None:
    run, out = tune(*options), tmp_path / "exported"
    scripts.export.main([str(run), str(out)])
    assert "merging changed " in capsys.readouterr().out
    assert answers(out, capsys) == answers(run, capsys)
    plain = AutoModelForCausalLM.from_pretrained(out)  # as anybody would load it
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    own_head = "lm_head" in str(options) and "embed" not in str(options)
    assert (head.weight is embeddings.weight) != own_head
    if own_head:  # whose base shares its weights: the embeddings must be as they were
        before = load_file(smoke / "final/model.safetensors")["model.embed_tokens.weight"]
        assert embeddings.weight.equal(before)


def test_an_export_is_complete_and_names_no_path_of_this_machine(tune, tmp_path, smoke) -> None:
    run, out = tune(), tmp_path / "exported"
    scripts.export.main([str(run / "final"), str(out)])
    stops = GenerationConfig.from_pretrained(out).eos_token_id
    assert stops == [1]
    assert json.loads((out / "config.json").read_text())["use_cache"]
    card = (out / "README.md").read_text()
    for text in (
        "base_model: final",
        "- eval_loss: 0.0",
        "fingerprint ",
        "merging changed",
        "torch ",
        "loss.png",
    ):
        assert text in card
    for file in out.iterdir():
        if file.suffix in {".md", ".json", ".jinja"}:
            assert str(smoke.parent) not in file.read_text(), file


def test_all_weights_are_exported_as_they_are(smoke: Path, tmp_path, capsys) -> None:
    scripts.export.main([str(smoke), str(tmp_path / "exported")])
    assert "nothing to merge" in capsys.readouterr().out
    one, two = (
        load_file(f / "model.safetensors") for f in (smoke / "final", tmp_path / "exported")
    )
    assert all(one[name].equal(two[name]) for name in one)


def test_a_merge_that_changes_the_model_is_not_written(tune, tmp_path, monkeypatch) -> None:
    run, merge = tune(), export._merge

    def wrong(adapted):
        merged = merge(adapted)
        with torch.no_grad():
            merged.lm_head.weight.mul_(1.1)
        return merged

    monkeypatch.setattr(export, "_merge", wrong)
    with pytest.raises(RunError, match="more than rounding"):
        scripts.export.main([str(run), str(tmp_path / "exported")])
    assert not (tmp_path / "exported").exists()


def test_what_cannot_be_exported_is_refused(tune, tmp_path, refused, smoke: Path) -> None:
    run, out = tune(), tmp_path / "exported"
    out.mkdir()
    assert refused(scripts.export.main, str(run), str(out)) == [
        f"{out}: exists already; nothing is overwritten"
    ]
    out.rmdir()
    base = smoke / "final/config.json"
    described = json.loads(base.read_text())
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    for file in base.parent.iterdir():
        (quantized / file.name).write_bytes(file.read_bytes())
    described["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(described))
    (line,) = refused(scripts.export.main, str(run), str(out), "--base", str(quantized))
    assert "is quantized, and merging would round the adapter away" in line
    (run / "final/training_config.yaml").unlink()
    assert "not the result of a run" in refused(scripts.export.main, str(run), str(out))[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ({"r": 16}, "--max-lora-rank 16 "),
        ({"r": 24}, "--max-lora-rank 32 "),
        ({"r": 8, "use_dora": True}, "not serve an adapter alone with use_dora"),
        (
            {"r": 8, "modules_to_save": ["lm_head"]},
            "not serve an adapter alone with modules_to_save",
        ),
    ],
)
def test_the_advice_names_what_vllm_needs_or_refuses(
    tmp_path, adapter: dict, expected: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "a/b", **adapter})
    )
    assert expected in export.serving_advice(tmp_path, tmp_path / "out")[-1]


def test_the_card_gives_the_figures_of_the_step_that_is_exported(tune, tmp_path) -> None:
    run, out = tune(), tmp_path / "exported"
    record = json.loads((run / "record.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    earlier = lines[0] | {"step": 1, "loss": 7.25, "eval_loss": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [earlier, *lines]))
    (run / "record.json").write_text(json.dumps(record | {"final_step": 1}))
    scripts.export.main([str(run), str(out)])
    card = (out / "README.md").read_text()
    assert "- step: 1\n" in card
    assert "- loss: 7.25\n" in card
    assert "- eval_loss: not finite\n" in card


SAMPLING = {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize("lora", ["lora=null", "lora.r=4"])
@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("generation_config.json", {"eos_token_id": 0, "do_sample": False, **SAMPLING}),
        ("generation_config.json", {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}),
        ("config.json", SAMPLING),
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
        f"model.name={base}", "model.init=pretrained", lora, "data.eval=null",
        "training.max_steps=1",
    )  # fmt: skip
    scripts.export.main([str(run), str(tmp_path / "exported")])
    for folder in [tmp_path / "exported", *([run / "final"] if lora == "lora=null" else [])]:
        saved = GenerationConfig.from_pretrained(folder)
        assert 1 in cast(list, saved.eos_token_id)
        assert (saved.do_sample, saved.temperature) == (True, 0.6) or "num_beams" in values
