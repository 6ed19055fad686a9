"""An evaluation finds the loss that training found, and compares a model with its base."""

import json
import shutil
from pathlib import Path

import pytest

import scripts.evaluate
from conftest import SMOKE, chat, metrics
from src.tools.evaluate import as_markdown
from src.training.tracking import connect

SAMPLE = str(Path(SMOKE).parents[1] / "data/sample.jsonl")


def test_the_loss_is_the_one_that_training_found(smoke: Path, capsys) -> None:
    scripts.evaluate.main([str(smoke), SAMPLE, "--samples", "5", "--max-length", "40"])
    result = json.loads((smoke / "final/evaluation.json").read_text())
    figures = result["scores"]["model"]
    assert figures["loss"] == pytest.approx(metrics(smoke)[-1]["eval_loss"], rel=1e-4)
    assert figures["exact"] == figures["contains"] == 1
    assert len(result["samples"]) == 5
    assert (smoke / "final/evaluation.md").read_text().strip() in capsys.readouterr().out


def test_an_adapter_is_compared_with_its_base(smoke: Path, train, write_rows) -> None:
    rows = write_rows(chat("What is the code?", "seven"), chat("And the answer?", "It is seven."))
    folder = train(
        f"model.name={smoke / 'final'}", "model.init=pretrained", "lora.r=8",
        f"data.train={rows}", "data.eval=null", "training.epochs=40", "training.batch_size=1",
        "training.learning_rate=1e-2",
    )  # fmt: skip
    scripts.evaluate.main([str(folder), rows, "--max-length", "16"])
    result = json.loads((folder / "final/evaluation.json").read_text())
    scores = result["scores"]
    assert scores["model"]["loss"] < 0.1 < scores["base"]["loss"]
    assert scores["model"]["exact"] == 1 > scores["base"]["exact"]
    assert {"prompt", "expected", "model", "base"} == result["samples"][0].keys()


def test_exact_and_contained_answers_are_counted_apart(smoke: Path, write_rows) -> None:
    greeting = "Hello! I am a very small model."
    rows = [chat("Say hello.", answer) for answer in (greeting, "a very small model", "no")]
    scripts.evaluate.main([str(smoke), write_rows(*rows), "--max-length", "40"])
    figures = json.loads((smoke / "final/evaluation.json").read_text())["scores"]["model"]
    assert figures["exact"] == pytest.approx(1 / 3)
    assert figures["contains"] == pytest.approx(2 / 3)


def test_rows_of_plain_text_are_scored_by_their_loss_alone(smoke: Path, write_rows) -> None:
    scripts.evaluate.main([str(smoke), write_rows({"text": "a text"}, {"text": "another"})])
    result = json.loads((smoke / "final/evaluation.json").read_text())
    assert result["scores"]["model"].keys() == {"loss", "perplexity"}
    assert result["samples"] == []


def test_bad_rows_are_named_before_anything_is_loaded(smoke: Path, refused, write_rows) -> None:
    rows = write_rows(chat("a", "b"), {"prompt": "x"})
    assert ":2: `completion` is missing" in refused(scripts.evaluate.main, str(smoke), rows)[0]
    assert "no such file" in refused(scripts.evaluate.main, str(smoke), "nothing.jsonl")[0]


def test_a_table_survives_what_models_say() -> None:
    figures = {"loss": 1.0, "perplexity": 2.7, "exact": 0.5, "contains": 1.0}
    row = {"prompt": [{"role": "user", "content": "a | b\nc"}], "expected": "x" * 300, "model": ""}
    text = as_markdown({"data": "d", "scores": {"model": figures}, "samples": [row]})
    assert r"| a \| b c | " + "x" * 200 + " … |  |" in text


def test_a_warning_names_rows_that_the_model_was_trained_on(smoke, capsys) -> None:
    for source, warned in (("data/sample.jsonl", True), (SAMPLE, False)):
        scripts.evaluate.main([str(smoke), source, "--samples", "1", "--max-length", "1"])
        assert ("is what the model was trained on" in capsys.readouterr().err) == warned


def test_scores_are_added_to_the_mlflow_run_that_made_the_model(
    smoke, tmp_path, monkeypatch, write_rows
) -> None:
    copy = shutil.copy(smoke.parent / "mlflow.db", tmp_path / "copy.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy}")
    rows = write_rows(chat("Say hello.", "Hello! I am a very small model."))
    scripts.evaluate.main([str(smoke), rows, "--max-length", "32"])
    run_id = json.loads((smoke / "record.json").read_text())["mlflow"]
    assert connect().get_run(run_id).data.metrics["evaluation_exact"] == 1
    kept = {file.path for file in connect().list_artifacts(run_id)}
    assert {"evaluation.md", "config.yaml", "samples.jsonl", "loss.png"} <= kept
