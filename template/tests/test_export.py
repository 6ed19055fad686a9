"""A run becomes one model folder that says the same, or nothing is written."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import scripts.export
import scripts.inference
import scripts.train
from conftest import SMOKE
from src.tools import export
from src.utils.errors import RunError


@pytest.fixture(scope="module")
def tune(smoke: Path, tmp_path_factory: pytest.TempPathFactory):
    """Train adapters on the smoke model: `tune(lora.r=4, …)`; returns the run's folder."""

    def call(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("tuned") / "run"
        scripts.train.main([
            SMOKE, "tracking.enabled=false", f"output_dir={folder}", "device=cpu",
            f"model.name={smoke / 'final'}", "model.init=pretrained", "lora.r=4",
            "training.epochs=2", "training.learning_rate=3e-3", "training.warmup_steps=0",
            "evaluation.samples=0", *overrides,
        ])  # fmt: skip
        return folder

    return call


@pytest.fixture(scope="module")
def tuned(tune) -> Path:
    """A run that tests read and leave as it is."""
    return tune()


def answers(model: Path, capsys) -> list[str]:
    capsys.readouterr()
    questions = ["What does LoRA train?", "Say hello.", "your question"]
    scripts.inference.main([str(model), *questions])
    return capsys.readouterr().out.splitlines()


OPTIONS = "r=4 dora=true target_modules=[q_proj,lm_head] modules_to_save=[embed_tokens,lm_head]"


@pytest.mark.parametrize(
    "option", [pytest.param(o, marks=[pytest.mark.slow] * (o != "r=4")) for o in OPTIONS.split()]
)
def test_the_merged_model_says_what_the_adapter_says(
    tune, tuned, tmp_path, capsys, smoke: Path, option: str
) -> None:
    run, out = tuned if option == "r=4" else tune(f"lora.{option}"), tmp_path / "exported"
    capsys.readouterr()
    scripts.export.main([str(run), str(out)])
    printed = capsys.readouterr().out
    assert "merging changed " in printed
    assert answers(out, capsys) == answers(run, capsys)
    plain = AutoModelForCausalLM.from_pretrained(out)  # as anybody would load it
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    own_head = "q_proj" in option
    assert (head.weight is embeddings.weight) != own_head
    if own_head:  # whose base shares its weights: the embeddings must be as they were
        before = load_file(smoke / "final/model.safetensors")["model.embed_tokens.weight"]
        assert embeddings.weight.equal(before)


def test_an_export_is_complete_and_its_card_names_only_what_is_there(
    tuned, tmp_path, smoke, monkeypatch, capsys
) -> None:
    out = tmp_path / "exported"
    scripts.export.main([str(tuned / "final"), str(out)])
    assert GenerationConfig.from_pretrained(out).eos_token_id == [1]
    assert json.loads((out / "config.json").read_text())["use_cache"]
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "final"
    for text in ("- eval_loss: 0.0", "- fingerprint.train: ", "merging changed", "- torch: "):
        assert text in card
    assert all((out / name).is_file() for name in re.findall(r"\]\((.*?)\)", card))
    assert "training_config.yaml" not in card
    for file in out.iterdir():
        if file.suffix in {".md", ".json", ".jinja"}:
            assert str(smoke.parent) not in file.read_text(), file
    snippet = tmp_path / "snippet.py"
    snippet.write_text(card.split("```")[1].removeprefix("python"))
    monkeypatch.chdir(tmp_path)
    said = answers(out, capsys)
    runpy.run_path(str(snippet))
    assert capsys.readouterr().out.splitlines() == said[2:]


def test_all_weights_are_exported_as_they_are_and_random_ones_have_no_base(
    smoke: Path, tmp_path, capsys
) -> None:
    out = tmp_path / "exported"
    scripts.export.main([str(smoke), str(out)])
    assert "nothing to merge" in capsys.readouterr().out
    one, two = (load_file(folder / "model.safetensors") for folder in (smoke / "final", out))
    assert all(one[name].equal(two[name]) for name in one)
    card = (out / "README.md").read_text()
    assert "Trained from random weights; its architecture is `configs/tiny`'s." in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_a_merge_that_changes_the_model_is_not_written(tuned, tmp_path, monkeypatch) -> None:
    merge = export._merge

    def wrong(adapted):
        merged = merge(adapted)
        with torch.no_grad():
            merged.lm_head.weight.mul_(1.1)
        return merged

    monkeypatch.setattr(export, "_merge", wrong)
    with pytest.raises(RunError, match="more than rounding"):
        scripts.export.main([str(tuned), str(tmp_path / "exported")])
    assert not (tmp_path / "exported").exists()


def test_a_card_gives_the_figures_of_its_step_and_says_that_the_rows_are_gone(
    tuned, tmp_path
) -> None:
    run, out = shutil.copytree(tuned, tmp_path / "run"), tmp_path / "exported"
    recipe = run / "final/training_config.yaml"
    config = yaml.safe_load(recipe.read_text())
    config["data"] |= {"train": "gone.jsonl", "eval": None}
    recipe.write_text(yaml.safe_dump(config))
    record = json.loads((run / "record.json").read_text())
    earlier = {"step": 1, "loss": 7.25, "eval_loss": None}
    lines = f"{json.dumps(earlier)}\n{(run / 'metrics.jsonl').read_text()}"
    (run / "metrics.jsonl").write_text(lines)
    (run / "record.json").write_text(json.dumps(record | {"final_step": 1}))
    scripts.export.main([str(run), str(out)])
    card = (out / "README.md").read_text()
    assert ", on made-up tokens as gone.jsonl cannot be read; the loss is now " in card
    assert "\n- step: 1\n- loss: 7.25\n- eval_loss: None\n" in card
