"""A run in MLflow says where it comes from, and no secret is ever part of it."""

import getpass
import shutil
from pathlib import Path

import pytest

import scripts.train
from conftest import SMOKE
from src.training import record

SECRETS = {
    "HF_TOKEN": "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345",
    "MY_API_KEY": "very-private-words-123",
    "DB_PASSWORD": "correct horse battery",
}
LOOSE = "sk-0123456789abcdefghijklmnop"  # in no variable, but of a token's shape


@pytest.fixture
def tracked(tmp_path, monkeypatch, mlflow_database):
    """Train a little with secrets all around; the client, the run and everything written."""
    from mlflow import MlflowClient

    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    client.create_experiment("told", (tmp_path / "store").as_uri())
    answers = {
        ("rev-parse", "HEAD"): "0123abc",
        ("status", "--porcelain"): " M src/config.py",
        ("diff", "HEAD"): f"+token = '{SECRETS['HF_TOKEN']}'\n+other = '{LOOSE}'",
    }
    monkeypatch.setattr(record, "git", lambda _, *words: answers[words])
    monkeypatch.setattr("sys.argv", ["scripts/train.py", f"--x={SECRETS['MY_API_KEY']}"])
    scripts.train.main([
        SMOKE, f"output_dir={tmp_path / 'run'}", "device=cpu", "training.max_steps=2",
        "tracking.experiment=told", f"tracking.run_name={SECRETS['DB_PASSWORD']}",
        f"evaluation.prompts=[say {LOOSE}]",
    ])  # fmt: skip
    experiment = client.get_experiment_by_name("told")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run, tmp_path


def test_a_run_says_who_made_it_of_what(tracked) -> None:
    client, run, _ = tracked
    tags = run.data.tags
    assert tags["mlflow.user"] == getpass.getuser()
    assert tags["mlflow.source.name"] == "scripts/train.py"
    assert tags["mlflow.source.git.commit"] == "0123abc"
    assert tags["git.dirty"] == "true"
    assert tags["command"].startswith("uv run scripts/train.py")
    assert {"torch", "transformers", "peft", "uv.lock", "template", "python"} <= tags.keys()
    inputs = {i.dataset.name: i.dataset for i in run.inputs.dataset_inputs}
    assert inputs.keys() == {"train", "eval"}
    assert "data/sample.jsonl" in inputs["train"].source
    assert inputs["train"].digest == tags["fingerprint.train"]
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    wanted = {"config.yaml", "samples.jsonl", "loss.png", "uv.lock", "uncommitted.diff"}
    assert kept == wanted | {"samples.json"}


def test_no_secret_is_in_the_database_or_an_artifact(tracked) -> None:
    _, _, folder = tracked
    looked_at = 0
    paths = [folder / "mlflow.db", folder / "run/record.json", *(folder / "store").rglob("*")]
    for path in paths:
        if path.is_file():
            looked_at += 1
            content = path.read_bytes()
            for secret in (*SECRETS.values(), LOOSE):
                assert secret.encode() not in content, (path, secret)
    assert looked_at > 12, "the model's files too"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://me:pass@host/x", "https://***@host/x"),
        ("token hf_abcdefghijklmnopqrstuv.", "token ***."),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123", "***"),
        ("hf_datasets and sk-learn stay", "hf_datasets and sk-learn stay"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, hidden: str) -> None:
    assert record.hide(text) == hidden


def test_outside_of_git_a_run_has_no_commit(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "PROJECT_ROOT", tmp_path)
    tags = record.provenance()
    assert "mlflow.source.git.commit" not in tags
    assert "git.dirty" not in tags
    assert record.uncommitted() == ""
