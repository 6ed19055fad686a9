"""`scripts/sync.py` sends what MLflow lacks of a run that has ended."""

import json
import shutil
from pathlib import Path

import pytest

import scripts.sync
from conftest import ROOT
from src.training.tracking import connect
from src.utils.files import only_run_in


@pytest.fixture
def unsent(smoke: Path, tmp_path: Path) -> Path:
    """The smoke run once more, as if it had been killed before anything was sent."""
    copy = Path(shutil.copytree(smoke, tmp_path / "run"))
    facts = json.loads((copy / "record.json").read_text())
    left = {key: facts[key] for key in facts.keys() - {"mlflow", "mlflow_experiment"}}
    (copy / "record.json").write_text(json.dumps(left | {"key": "other", "status": "RUNNING"}))
    return copy


def test_a_killed_run_is_sent_once(unsent, tmp_path, mlflow_database, monkeypatch, capsys) -> None:
    store = shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    connect().create_experiment(ROOT.name, (tmp_path / "store").as_uri())
    for printed in (" 16 lines of metrics", " 0 lines of metrics"):
        scripts.sync.main([str(unsent)])
        assert printed in capsys.readouterr().out
    run_id = json.loads((unsent / "record.json").read_text())["mlflow"]
    assert connect().get_run(run_id).info.status == "KILLED"


def test_a_run_that_goes_on_or_is_none_is_refused(unsent, tmp_path, refused) -> None:
    with only_run_in(unsent):
        assert "another run is writing to" in refused(scripts.sync.main, str(unsent))[0]
    assert "no record.json in it" in refused(scripts.sync.main, str(tmp_path))[0]
