"""Two runs side by side: what differs, what each reached, and one picture."""

import json
import shutil
from pathlib import Path

import pytest

import scripts.compare
from src.tools.compare import compare


@pytest.fixture
def other(smoke: Path, tmp_path) -> Path:
    """The smoke run once more, as if with another rate, library, commit and rows."""
    copy = Path(shutil.copytree(smoke, tmp_path / "other"))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(
        config.replace("learning_rate: 0.003", "learning_rate: 0.001").replace(
            f"output_dir: {smoke}", f"output_dir: {copy}"
        )
    )
    record = json.loads((copy / "record.json").read_text())
    record["tags"] |= {"torch": "2.0", "fingerprint.train": "0", "command": "other"}
    record["tags"]["mlflow.source.git.commit"] = "0123abc"
    (copy / "record.json").write_text(json.dumps(record | {"status": "KILLED"}))
    (copy / "uncommitted.diff").write_text("+1")
    return copy


def test_what_differs_is_named_and_nothing_else(smoke: Path, other: Path) -> None:
    different, _ = compare([smoke, other])
    assert different.keys() == {
        "training.learning_rate", "torch", "fingerprint.train", "mlflow.source.git.commit",
        "uncommitted.diff",
    }  # fmt: skip
    assert different["training.learning_rate"] == ["0.003", "0.001"]
    assert different["uncommitted.diff"][0] == "-"


def test_the_script_prints_both_and_draws_their_curves(smoke, other, tmp_path, capsys) -> None:
    from matplotlib.image import imread

    picture = tmp_path / "curves.png"
    scripts.compare.main([str(smoke), str(other), "--output", str(picture)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["training.learning_rate", "0.003", "0.001"] in rows
    assert ["status", "FINISHED", "KILLED"] in rows
    assert ["steps", "160", "160"] in rows
    assert imread(picture).shape[:2] == (540, 960)
    scripts.compare.main([str(smoke), str(smoke), "--output", str(picture)])
    assert capsys.readouterr().out.splitlines()[1] == "nothing"


def test_what_is_no_run_is_refused(smoke, tmp_path, refused) -> None:
    assert "not a run's folder" in refused(scripts.compare.main, str(smoke), str(tmp_path))[0]
    assert "give two or more to compare" in refused(scripts.compare.main, str(smoke))[0]


def test_a_loss_that_was_not_finite_is_named(smoke, other) -> None:
    line = json.loads((other / "metrics.jsonl").read_text().splitlines()[-1])
    with (other / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line | {"step": 161, "loss": None}) + "\n")
    assert compare([smoke, other])[1]["loss"][1] == "not finite"
