"""A small model that really speaks: tuned in 4 bits, asked, evaluated against its base, merged.

uv run --group smollm2 pytest tests/test_real_model.py
"""

import json
import re
from pathlib import Path

import pytest

import smollm2
from helpers import render, script

pytestmark = pytest.mark.skipif(
    smollm2.gguf_file() is None, reason="the group smollm2 is not installed: 88 MB, compiled"
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose run `outputs/tuned` took two minutes; the model is in `model/`."""
    folder = render(tmp_path_factory.mktemp("real") / "project")
    smollm2.make(folder / "model")
    script(
        folder, "train", "model.name=model", "data.train=data/sample.jsonl", "device=cpu",
        "data.eval=data/sample.jsonl", "data.max_length=256", "training.batch_size=4",
        "training.max_steps=40", "training.epochs=40", "training.learning_rate=1e-3",
        "training.warmup_steps=2", "training.scheduler=linear",
        "training.eval_every=20", "output_dir=outputs/tuned", "tracking.enabled=false",
    )  # fmt: skip
    return folder


def test_it_learns_the_sample_word_for_word_and_still_knows_paris(tuned: Path) -> None:
    question = "What does LoRA train?"
    answer = "Two small matrices per layer, whose product is added to the frozen weight."
    paris = "What is the capital of France?"
    assert answer not in script(tuned, "inference", "model", question, "--max-length", "40")
    learnt, known = script(tuned, "inference", "outputs/tuned", question, paris).splitlines()
    assert learnt == answer
    assert "Paris" in known
    samples = (tuned / "outputs/tuned/samples.jsonl").read_text().splitlines()
    first, last = (json.loads(line)["samples"][0]["answer"] for line in (samples[0], samples[-1]))
    assert (first != answer, last) == (True, answer)


def test_its_evaluation_beats_its_base(tuned: Path) -> None:
    script(tuned, "evaluate", "outputs/tuned", "data/sample.jsonl", "--samples", "4")
    scores = json.loads((tuned / "outputs/tuned/evaluation.json").read_text())["scores"]
    assert scores["model"]["loss"] < 0.5 < 2 < scores["base"]["loss"]
    assert scores["model"]["exact"] > 0.7 > 0.1 > scores["base"]["exact"]


def test_merged_into_the_full_base_it_tells_what_four_bits_were_worth(tuned: Path) -> None:
    told = script(tuned, "export", "outputs/tuned", "exported")
    found = re.search(r"the loss is now ([\d.]+), and was ([\d.]+) on the 4bit base", told)
    assert found, told
    merged, trained = map(float, found.groups())
    assert trained < merged
    paris = script(tuned, "inference", "exported", "What is the capital of France?")
    assert "Paris" in paris
