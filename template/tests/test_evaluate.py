"""An evaluation finds the loss that training found, and compares a model with its base."""

import json
import shutil
from pathlib import Path

import pytest

import scripts.evaluate
from conftest import SMOKE, chat, metrics
from src.tools.evaluate import write_evaluation
from src.training.tracking import connect

SAMPLE = str(Path(SMOKE).parents[1] / "data/sample.jsonl")


@pytest.fixture(autouse=True)
def learnt(smoke: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of the smoke run, and of what MLflow knows of it, to write evaluations into."""
    copy = shutil.copy(smoke.parent / "mlflow.db", tmp_path / "copy.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy}")
    return shutil.copytree(smoke, tmp_path / "learnt")


def evaluate(run: Path, rows: str, *options: str) -> dict:
    scripts.evaluate.main([str(run), rows, "--max-length", "40", *options])
    return json.loads((run / "evaluation.json").read_text())


def test_the_loss_is_the_one_that_training_found_and_mlflow_gets_it(learnt: Path, capsys) -> None:
    result = evaluate(learnt, SAMPLE, "--samples", "5")
    figures, (printed, warned) = result["scores"]["model"], capsys.readouterr()
    assert figures["loss"] == pytest.approx(metrics(learnt)[-1]["eval_loss"], rel=1e-4)
    assert figures["exact"] == figures["contains"] == 1
    assert (len(result["samples"]), warned) == (5, "")
    page = learnt / "evaluation.md"
    asked = f"Rows in loss: {result['rows']}; answered: the first 5."
    assert result["rows"] == len(Path(SAMPLE).read_text().splitlines())
    assert printed == f"{page.read_text()}Written to {page} and evaluation.json.\n"
    assert page.read_text().splitlines()[-1] == asked
    run_id = json.loads((learnt / "record.json").read_text())["mlflow"]
    assert connect().get_run(run_id).data.metrics["evaluation_exact"] == 1
    kept = {file.path for file in connect().list_artifacts(run_id)}
    assert {"evaluation.md", "config.yaml", "samples.jsonl", "loss.png"} <= kept
    (checkpoint, *_) = (learnt / "checkpoints").iterdir()
    scripts.evaluate.main([str(checkpoint), SAMPLE, "--samples", "0"])
    assert (learnt / f"evaluation-{checkpoint.name}/evaluation.md").is_file(), "it is not pruned"
    evaluate(learnt, "data/sample.jsonl", "--samples", "0")
    assert "is what the model was trained on" in capsys.readouterr().err


def test_an_adapter_is_compared_with_its_base(smoke: Path, train, write_rows) -> None:
    rows = write_rows(chat("What is the code?", "seven"), chat("And the answer?", "It is seven."))
    folder = train(
        f"model.name={smoke / 'final'}", "model.init=pretrained", "lora.r=8",
        f"data.train={rows}", "data.eval=null", "training.epochs=40", "training.batch_size=1",
        "training.learning_rate=1e-2",
    )  # fmt: skip
    result = evaluate(folder, rows)
    scores = result["scores"]
    assert scores["model"]["loss"] < 0.1 < scores["base"]["loss"]
    assert scores["model"]["exact"] == 1 > scores["base"]["exact"]
    assert {"prompt", "expected", "model", "base"} == result["samples"][0].keys()


def test_answers_are_counted_as_exact_or_containing_and_text_by_its_loss_alone(
    learnt: Path, write_rows
) -> None:
    answers = ("Hello! I am a very small model.", "a very small model", "no")
    rows = write_rows(*[chat("Say hello.", answer) for answer in answers])
    figures = evaluate(learnt, rows)["scores"]["model"]
    assert (figures["exact"], figures["contains"]) == pytest.approx((1 / 3, 2 / 3))
    earlier = (learnt / "evaluation.md").read_text()
    result = evaluate(learnt, write_rows({"text": "a text"}, name="other.jsonl"))
    assert (learnt / "evaluation-1.md").read_text() == earlier, "of other rows: it stays"
    assert result["scores"]["model"].keys() == {"loss", "perplexity"}
    assert result["samples"] == []


def test_bad_rows_and_numbers_are_named_before_anything_is_loaded(
    learnt: Path, refused, write_rows, capsys
) -> None:
    rows = write_rows(chat("a", "b"), {"prompt": "x"})
    assert ":2: has ['prompt']; a row needs" in refused(scripts.evaluate.main, str(learnt), rows)[0]
    assert "No such file" in refused(scripts.evaluate.main, str(learnt), "nothing.jsonl")[0]
    only = "command line: training.seed=1: only data. keys go here"
    assert refused(scripts.evaluate.main, str(learnt), rows, "training.seed=1") == [only]
    with pytest.raises(SystemExit, match="2"):
        evaluate(learnt, rows, "--max-length", "0")
    assert "--max-length: 0 is not from 1 to" in capsys.readouterr().err


def test_a_table_survives_what_models_say(tmp_path) -> None:
    row = {"prompt": [{"role": "user", "content": "a | b\nc"}], "expected": "x" * 300, "model": ""}
    result = {"data": "d", "rows": 1, "scores": {"model": {"loss": 1.0}}, "samples": [row]}
    text = write_evaluation(result, tmp_path / "new").read_text()
    assert r"| a \| b c | " + "x" * 200 + " … |  |" in text
