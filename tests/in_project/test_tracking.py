"""MLflow has what a run's folder has, and never holds up or stops a run."""

import http.server
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.request import urlopen

import pytest
from tqdm import tqdm

import scripts.inference
import scripts.sync
import scripts.train
from conftest import ROOT, SMOKE, metrics
from src.config import load_config
from src.trained import find_trained
from src.training import tracking
from src.training.record import start_record, update_record
from src.training.tracking import Sender, Tracker, connect
from src.utils.errors import Interrupted, RunError

QUESTION = "What does LoRA train?"
ANSWER = "Two small matrices per layer, whose product is added to the frozen weight."


def new_store(tmp_path: Path, monkeypatch, mlflow_database: Path) -> Path:
    """A database of MLflow's that runs are sent to from now on."""
    path = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    connect().create_experiment(ROOT.name, (tmp_path / "store").as_uri())
    return path


store = pytest.fixture(name="store")(new_store)


@pytest.fixture
def seen(smoke: Path, tmp_path, monkeypatch) -> Path:
    """The smoke run and a copy of the database that has it."""
    copy = shutil.copy(smoke.parent / "mlflow.db", tmp_path / "seen.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{copy}")
    return smoke


def runs(experiment: str = ROOT.name) -> list:
    client = connect()
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def steps(run) -> list[int]:
    """The steps that MLflow has of a run, each as often as it has it."""
    return [p.step for p in connect().get_metric_history(run.info.run_id, "loss")]


def begin(folder: Path, step: int = 0, **tracking: object) -> Path:
    """A run's folder with its record, as Recorder makes them."""
    config = load_config(SMOKE, [f"tracking.{k}={v}" for k, v in tracking.items()])
    folder.mkdir(exist_ok=True)
    start_record(folder, config.written, {"fingerprint.train": "0" * 16}, step)
    return folder


def add(folder: Path, *steps: int) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in steps:
            line = {"step": step, "loss": 1 / step, "eval_loss": None, "learning_rate": 0.1}
            file.write(json.dumps(line | {"time": time.time()}) + "\n")


def track(folder: Path, warn: Callable = pytest.fail) -> Tracker:
    return Tracker(folder, warn)


def end(folder: Path, tracker: Tracker, status: str = "FINISHED") -> None:
    update_record(folder, status=status, ended=int(time.time() * 1000))
    tracker.close()


def send_later(folder: Path) -> int:
    """Send what MLflow lacks of a run that has ended, as scripts/sync.py does."""
    return Sender(folder).send()


def test_mlflow_has_the_parameters_metrics_and_tags_of_the_run(seen: Path) -> None:
    client, (run,) = connect(), runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.003"
    assert run.data.tags["final"] == "step 160 of 160, the best evaluation"
    history = client.get_metric_history(run.info.run_id, "loss")
    logged = [(m["step"], m["loss"], int(m["time"] * 1000)) for m in metrics(seen)]
    assert [(p.step, p.value, p.timestamp) for p in history] == logged


def test_the_result_is_a_model_that_answers_by_its_uri_with_its_evaluation(seen, capfd) -> None:
    client, (run,) = connect(), runs()
    best_first = [{"field_name": "metrics.eval_loss"}]
    (model,) = client.search_logged_models([run.info.experiment_id], order_by=best_first)
    assert (model.name, model.status) == ("final-160", "READY")
    last = metrics(seen)[-1]
    assert {m.key: m.value for m in model.metrics}["eval_loss"] == last["eval_loss"]
    for name in (f"models:/{model.model_id}", str(seen)):
        capfd.readouterr()
        scripts.inference.main([name, QUESTION])
        assert capfd.readouterr().out == f"{ANSWER}\n"


def test_a_model_is_listed_once_though_sending_failed_and_a_large_one_without_its_files(
    store, seen, tmp_path, monkeypatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")  # which has no runs yet
    copy = shutil.copytree(seen, tmp_path / "copy")
    config = (copy / "config.yaml").read_text().replace("max_model_gib: 1.0", "max_model_gib: 0")
    (copy / "config.yaml").write_text(config)
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "finalize_logged_model", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            send_later(copy)
    for _ in range(2):
        send_later(copy)
    client, (run,) = connect(), runs()
    models = client.search_logged_models([run.info.experiment_id])
    assert [(m.name, m.status) for m in models] == [("final-160", "READY")]
    assert models[0].tags["folder"] == str(copy / "final")
    assert not list((tmp_path / "store").rglob("*.safetensors"))


def test_files_of_a_run_are_found_by_its_uri(tmp_path, seen: Path, refused) -> None:
    client = connect()
    number = client.create_experiment("models", (tmp_path / "store").as_uri())
    run = client.create_run(number).info.run_id
    client.log_artifacts(run, str(seen / "final"), "model")
    found = Path(find_trained(f"runs:/{run}/model").name)
    saved = "model.safetensors"
    assert (found / saved).read_bytes() == (seen / "final" / saved).read_bytes()
    lines = refused(scripts.inference.main, "runs:/0123456789abcdef0123456789abcdef/model", "hi")
    assert lines[0].startswith("runs:/0123456789abcdef0123456789abcdef/model: ")


def test_a_run_is_sent_once_and_whole_over_failures_and_restarts(
    tmp_path, store, monkeypatch
) -> None:
    from mlflow import MlflowClient

    warnings: list[str] = []
    folder = begin(tmp_path / "run")
    tracker = track(folder, warnings.append)
    add(folder, 2, 4, 6)
    while not (sent := runs()) or steps(sent[0]) != [2, 4, 6]:
        time.sleep(0.05)
    assert sent[0].info.status == "RUNNING"
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        add(folder, 8)
        while not warnings:
            time.sleep(0.05)
    add(folder, 10)
    end(folder, tracker, "KILLED")
    (run,) = runs()
    assert (run.info.status, steps(run)) == ("KILLED", [2, 4, 6, 8, 10])
    assert len(warnings) == 1
    (folder / "metrics.jsonl").unlink()  # as drop_lines_after would
    again = begin(tmp_path / "run", step=2, run_name="other")
    add(again, 2, 4, 6, 8, 10, 12)
    end(again, track(again))
    (run,) = runs()
    assert (run.info.status, steps(run)) == ("FINISHED", [2, 4, 6, 8, 10, 12])
    assert run.data.params["tracking.run_name"] == "None", "the first value stays"


def test_an_interrupted_run_ends_as_killed(tmp_path, monkeypatch, store) -> None:
    def interrupt(_bar: tqdm) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tqdm, "update", interrupt)
    folder = f"output_dir={tmp_path / 'run'}"
    with pytest.raises(Interrupted, match="stopped by SIGINT after step 1 of") as stopped:
        scripts.train.main([SMOKE, folder, "device=cpu", "data.eval=null"])
    assert stopped.value.exit_code == 130
    assert runs()[0].info.status == "KILLED"


WAITING = [pytest.param(name, marks=pytest.mark.slow) for name in ("hangs", "is locked")]


@pytest.fixture(params=["refuses", "answers 501", *WAITING])
def fault(request, tmp_path, monkeypatch, mlflow_database) -> Iterator[None]:
    """A place that takes no runs, in its ways."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # 10 s else
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 3.0)
    uri, port = "http://user:canary@127.0.0.1:{}", 9
    with ExitStack() as stack:
        if request.param == "is locked":
            copied = shutil.copy(mlflow_database, tmp_path / "locked.db")
            uri = f"sqlite:///{copied}?timeout=1"  # 5 s else
            held = stack.enter_context(closing(sqlite3.connect(tmp_path / "locked.db")))
            held.execute("BEGIN EXCLUSIVE")
        elif request.param == "answers 501":
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
            threading.Thread(target=stack.enter_context(server).serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            port = server.server_port
        elif request.param == "hangs":
            port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port))
        yield


@pytest.mark.usefixtures("fault")
def test_a_place_that_takes_no_runs_costs_one_warning_and_gets_all_later(
    tmp_path, capfd, monkeypatch, mlflow_database
) -> None:
    warnings: list[str] = []
    folder = begin(tmp_path / "run")
    started = time.perf_counter()
    tracker = track(folder, warnings.append)
    assert time.perf_counter() - started < 1, "a start waits for nobody"
    add(folder, *range(1, 21))
    end(folder, tracker, "KILLED")
    assert time.perf_counter() - started < 10
    (warning,) = warnings
    assert "warning: MLflow " in warning
    assert warning.endswith(f"uv run scripts/sync.py {tmp_path / 'run'}")
    tracker.join()
    new_store(tmp_path, monkeypatch, mlflow_database)
    assert send_later(tmp_path / "run") == 20
    (run,) = runs()
    assert steps(run) == [*range(1, 21)]
    assert run.info.status == "KILLED"
    assert send_later(tmp_path / "run") == 0
    (run,) = runs()
    assert steps(run) == [*range(1, 21)]
    printed = capfd.readouterr()
    assert "canary" not in printed.out + printed.err + warning


def test_lines_that_come_quickly_are_sent_together(tmp_path, store, monkeypatch) -> None:
    from mlflow import MlflowClient

    sent: list[int] = []
    log_batch = MlflowClient.log_batch

    def count(self, run_id, metrics=(), **others):
        sent.extend([len(metrics)] if metrics else [])
        return log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", count)
    monkeypatch.setattr(tracking, "PAUSE_SECONDS", 60.0)
    folder = begin(tmp_path / "run")
    add(folder, 1)
    tracker = track(folder)
    while not sent:
        time.sleep(0.1)
    add(folder, *range(2, 31))
    before = time.perf_counter()
    end(folder, tracker)
    assert time.perf_counter() - before < 20, "the end waits for no pause"
    assert len(sent) == 2, sent
    assert steps(runs()[0]) == [*range(1, 31)]


def test_where_to_look_is_the_server_even_if_it_knows_nothing_yet(tmp_path, monkeypatch) -> None:
    folder = begin(tmp_path / "run")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:canary@host:5000/")
    assert tracking.where_to_look(folder) == "http://host:5000/"
    update_record(folder, mlflow="r", mlflow_experiment="1")
    assert tracking.where_to_look(folder) == "http://host:5000/#/experiments/1/runs/r"


def test_what_mlflow_refuses_for_ever_is_said_in_its_words(tmp_path, store, monkeypatch) -> None:
    client, warnings, folder = connect(), [], begin(tmp_path / "run")
    experiment = client.get_experiment_by_name(ROOT.name)
    client.delete_experiment(experiment.experiment_id)
    end(folder, track(folder, warnings.append))
    assert f"uv run mlflow experiments restore -x {experiment.experiment_id}" in warnings[0]
    client.restore_experiment(experiment.experiment_id)
    send_later(folder)
    assert runs()[0].info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}")
    warnings.clear()
    end(folder, track(folder, warnings.append))
    assert "'sqlite:///mlflow.db'" in warnings[0]


def test_a_project_is_tracked_in_any_folder_and_says_what_to_do_after_a_move(
    tmp_path, monkeypatch, mlflow_database
) -> None:
    old, new = tmp_path / "a%2Fb? #", tmp_path / "moved"
    old.mkdir()
    shutil.copy(mlflow_database, old / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "PROJECT_ROOT", old)
    folder = begin(old / "run")
    add(folder, 1)
    end(folder, track(folder))
    kept = list((old / "mlruns").rglob("config.yaml"))
    assert len(kept) == 1
    copy = shutil.copytree(old, tmp_path / "copy")
    monkeypatch.setattr(tracking, "PROJECT_ROOT", copy)
    with pytest.raises(RunError, match="as this project has moved or is a copy"):
        send_later(copy / "run")
    old.rename(new)
    monkeypatch.setattr(tracking, "PROJECT_ROOT", new)
    with pytest.raises(RunError, match=f": ln -s {new} '.*#', or"):
        send_later(new / "run")
    old.symlink_to(new)
    assert send_later(new / "run") == 0
    kept = {file.path for file in connect().list_artifacts(runs()[0].info.run_id)}
    assert "config.yaml" in kept


def run_once(folder: Path) -> None:
    """A whole run; exits with the number of its warnings."""
    warnings: list[str] = []
    record = begin(folder)
    add(record, 1, 2, 3)
    tracking.CLOSE_SECONDS = 120
    end(record, track(record, warnings.append), "KILLED")
    sys.exit(len(warnings))


@pytest.mark.slow  # MLflow makes its tables
def test_four_runs_that_start_at_once_on_a_fresh_store_all_arrive(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'fresh.db'}")
    # Forks of this process: four that import MLflow take a minute of CPU.
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=run_once, args=[tmp_path / str(n)]) for n in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert [steps(run) for run in runs()] == [[1, 2, 3]] * 4


def serve(port: int) -> None:
    from mlflow.server import app

    app.run("127.0.0.1", port)


@contextmanager
def served(port: int) -> Iterator[None]:
    """What `mlflow server` serves, in a copy of this process, until it is killed."""
    server = multiprocessing.get_context("fork").Process(target=serve, args=[port], daemon=True)
    server.start()
    for _ in range(600):
        with suppress(OSError):
            urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
            break
        time.sleep(0.2)
    yield
    server.kill()
    server.join()


def test_a_real_server_dies_and_comes_back_and_has_all_in_the_end(tmp_path, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{tmp_path / 'server.db'}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(tmp_path / "artifacts"))
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 3.0)
    warnings: list[str] = []
    folder = begin(tmp_path / "run")
    with served(port):
        tracker = track(folder, warnings.append)
        add(folder, 1, 2)
        while not runs() or steps(runs()[0]) != [1, 2]:
            time.sleep(0.1)
    add(folder, 3, 4)
    (folder / "loss.png").write_bytes(b"png")
    end(folder, tracker)
    assert len(warnings) == 1
    with served(port):
        for _ in range(2):
            send_later(folder)
            (run,) = runs()
            assert run.info.status == "FINISHED"
            assert steps(run) == [1, 2, 3, 4]
        kept = {file.path for file in connect().list_artifacts(run.info.run_id)}
        assert kept >= {"config.yaml", "loss.png"}


def test_sync_names_a_server_that_does_not_answer_without_its_password(
    seen, tmp_path, monkeypatch
) -> None:
    copy = shutil.copytree(seen, tmp_path / "copy")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:canary@127.0.0.1:9")
    with pytest.raises(RunError, match="MLflow failed") as failure:
        scripts.sync.main([str(copy)])
    assert "canary" not in str(failure.value)
