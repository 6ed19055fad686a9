"""MLflow has what `metrics.jsonl` has, and never holds up or stops a run."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import scripts.evaluate
import scripts.inference
import scripts.train
from conftest import SMOKE, chat, metrics
from src.preflight import find_trained
from src.training.report import Recorder
from src.training.tracking import Tracker
from src.utils.errors import Interrupted


def test_mlflow_has_the_parameters_and_metrics_of_the_run(smoke: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{smoke.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("smoke")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.003"
    assert run.data.params["model.name"] == "configs/tiny"
    assert run.data.tags["final"] == "step 160 of 160, the best evaluation"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(p.step, p.value) for p in history] == [(m["step"], m["loss"]) for m in metrics(smoke)]


def test_an_evaluation_is_added_to_the_run_that_made_the_model(
    smoke: Path, monkeypatch, tmp_path, write_rows
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(smoke.parent / 'mlflow.db', tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    rows = write_rows(chat("Say hello.", "Hello! I am a very small model."))
    scripts.evaluate.main([str(smoke), rows, "--max-length", "32"])
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("smoke")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["evaluation_exact"] == 1
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"evaluation.md", "config.yaml", "samples.jsonl", "loss.png"} <= kept


def test_a_model_of_mlflow_is_found_by_its_uri(tmp_path, monkeypatch, smoke: Path, refused) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(smoke.parent / 'mlflow.db', tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    number = client.create_experiment("models", (tmp_path / "store").as_uri())
    run = client.create_run(number).info.run_id
    client.log_artifacts(run, str(smoke / "final"), "model")
    found = Path(find_trained(f"runs:/{run}/model"))
    saved = "model.safetensors"
    assert (found / saved).read_bytes() == (smoke / "final" / saved).read_bytes()
    lines = refused(scripts.inference.main, "runs:/0123456789abcdef0123456789abcdef/model", "hi")
    assert lines[0].startswith("runs:/0123456789abcdef0123456789abcdef/model: ")


def test_an_interrupted_run_goes_on_in_the_same_mlflow_run(tmp_path, monkeypatch, mlflow_database):
    from mlflow import MlflowClient

    shutil.copy(mlflow_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    arguments = [
        SMOKE, f"output_dir={tmp_path / 'run'}", "device=cpu", "data.eval=null",
        "training.max_steps=12", "training.log_every=2",
    ]  # fmt: skip
    add = Recorder.add

    def interrupt(self, step):
        add(self, step)
        if self.state.step == 8:
            # The tracker starts in the background: wait until it has an id to save.
            while not self.tracker.run_id:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Recorder, "add", interrupt)
    with pytest.raises(Interrupted, match=r"stopped by SIGINT after step 8 of 12") as stopped:
        scripts.train.main(arguments)
    assert stopped.value.exit_code == 130
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("smoke")
    assert experiment
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    monkeypatch.setattr(Recorder, "add", add)
    scripts.train.main([*arguments, "training.resume=auto"])
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "loss")
    assert [p.step for p in points] == [2, 4, 6, 8, 10, 12], "nothing twice"


def test_steps_that_are_taken_again_after_a_crash_are_sent_once(
    tmp_path, monkeypatch, mlflow_database
):
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    run_id = None
    for steps in ([2, 4, 6], [4, 6, 8]):
        tracker = Tracker("again", "run", {}, run_id, pytest.fail)
        for step in steps:
            tracker.log({"step": step, "loss": 1 / step, "eval_loss": None})
        tracker.close("FINISHED")
        run_id = tracker.run_id
    points = MlflowClient(uri).get_metric_history(str(run_id), "loss")
    assert [(p.step, p.value) for p in points] == [(n, 1 / n) for n in (2, 4, 6, 8)]


def test_a_tracking_server_that_refuses_costs_one_warning(train, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:canary@127.0.0.1:9")
    folder = train("tracking.enabled=true", "training.max_steps=4", "training.log_every=1")
    printed = capsys.readouterr()
    assert printed.out.count("MLflow failed") + printed.out.count("did not answer") == 1
    assert "canary" not in printed.out + printed.err
    assert len(metrics(folder)) == 4
