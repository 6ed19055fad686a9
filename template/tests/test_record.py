"""A run in MLflow says where it comes from, and no secret is ever part of it."""

import getpass
import shutil

import pytest

import scripts.train
from conftest import SMOKE
from src.training import record
from src.training.tracking import connect

SECRETS = {
    "HF_TOKEN": "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345",
    "MY_API_KEY": "very-private-words-123",
    "DB_PASSWORD": "correct horse battery",
}
LOOSE = "sk-0123456789abcdefghijklmnop"  # in no variable, but of a token's shape


def test_a_run_says_who_made_it_of_what_and_holds_no_secret(
    tmp_path, monkeypatch, mlflow_database
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = connect()
    experiment = client.create_experiment("secret", (tmp_path / "store").as_uri())
    answers = {
        ("rev-parse", "HEAD"): "0123abc",
        ("status", "--porcelain"): " M src/config.py",
        ("diff", "HEAD"): f"+token = '{SECRETS['HF_TOKEN']}'\n+other = '{LOOSE}'",
    }
    monkeypatch.setattr(record, "git", lambda *words: answers[words])
    monkeypatch.setattr("sys.argv", ["scripts/train.py", f"--x={SECRETS['MY_API_KEY']}"])
    scripts.train.main([
        SMOKE, f"output_dir={tmp_path / 'run'}", "device=cpu", "training.max_steps=2",
        "tracking.experiment=secret", f"tracking.run_name={SECRETS['DB_PASSWORD']}",
        f"evaluation.prompts=[say {LOOSE}]",
    ])  # fmt: skip
    (run,) = client.search_runs([experiment])
    tags = run.data.tags
    assert tags["mlflow.user"] == getpass.getuser()
    assert tags["mlflow.source.name"] == "scripts/train.py"
    assert tags["mlflow.source.git.commit"] == "0123abc"
    assert tags["git.dirty"] == "true"
    assert tags["command"].startswith("uv run scripts/train.py")
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept == {"config.yaml", "samples.jsonl", "loss.png", "uncommitted.diff"}
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 24, "the model's files too, in the run's folder and in MLflow's"
    for path in written:
        content = path.read_bytes()
        assert not [s for s in (*SECRETS.values(), LOOSE) if s.encode() in content], path
    named = {"torch", "transformers", "peft", "uv.lock", "template", "python"}
    assert named | {"fingerprint.train", "fingerprint.eval"} <= tags.keys()


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
