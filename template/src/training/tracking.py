"""MLflow: it gets what a run's folder holds, nothing twice, and never delays or stops a training.

`metrics.jsonl` and the other files are written first. A thread sends them while the run lives; what
did not arrive, `uv run scripts/sync.py FOLDER` sends later. MLflow takes seconds to import, so
only functions that need it do.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import tempfile
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from src.config import flatten, load_config
from src.training.metrics import read_metrics
from src.training.record import Record, hide, lock_hash
from src.utils.environment import PROJECT_ROOT, to_root
from src.utils.memory import GIB

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

PAUSE_SECONDS = 2.0  # between two sends: many lines cost a training no more than one does
RETRY_SECONDS = 30.0  # after a failure, until MLflow is tried again
CLOSE_SECONDS = 20.0  # how long the end of a run waits for a server that may be gone
UPLOAD_SECONDS = 1800.0  # and for one that answers, as models may be large
MAX_VALUE = 500  # characters of a parameter's value, which every MLflow store takes
MAX_FILE_BYTES = 10_000_000  # of a file that is sent along
FILES = ("config.yaml", "samples.jsonl", "left_out.jsonl", "loss.png", "uncommitted.diff")
TABLE = "samples.json"


class Tracker:
    """A thread that sends what a run has written, whenever there is more of it."""

    def __init__(self, warn: Callable[[str], None] = print) -> None:
        """`warn` is called once if MLflow cannot be reached."""
        self._warn, self._warned = warn, False
        self._news, self._end = threading.Event(), threading.Event()
        self._status = ""

    def start(self, record: Record) -> None:
        """Begin to send the run of this record; returns at once."""
        self._folder = record.folder
        self._thread = threading.Thread(target=self._work, args=[record], daemon=True)
        self.wake()
        self._thread.start()

    def wake(self) -> None:
        """Say that the folder has more; never waits."""
        self._news.set()

    def close(self, status: str) -> None:
        """Send all that is left, and that the run is FINISHED, FAILED or KILLED."""
        self._status = status
        self._end.set()
        self.wake()
        self._thread.join(UPLOAD_SECONDS if status == "FINISHED" else CLOSE_SECONDS)
        if self._thread.is_alive():
            self._complain("did not answer in time")

    def _work(self, record: Record) -> None:
        sender, status = Sender(record, live=True), ""
        while not status:
            self._news.wait()
            self._news.clear()
            status = self._status
            pause = PAUSE_SECONDS
            try:
                sender.send(status)
            except Exception as error:  # noqa: BLE001 - tracking must never stop a training
                # Its type alone: MLflow's messages repeat the URI with user and password.
                self._complain(f"failed ({type(error).__name__})")
                pause = RETRY_SECONDS
            self._end.wait(pause)  # so the end of the run is always tried, and at once

    def _complain(self, problem: str) -> None:
        if not self._warned:
            command = f"uv run scripts/sync.py {shlex.quote(to_root(self._folder))}"
            self._warn(f"warning: MLflow {problem}; later, this sends what is missing: {command}")
        self._warned = True


class Sender:
    """Sends one run. It finds the run by its key and a line by its step, so it can begin again."""

    def __init__(self, record: Record, live: bool = False) -> None:
        """Prepare; nothing is sent yet.

        Args:
            record: of the run.
            live: whether the run is going on in this process, whose machine is then watched.
        """
        self._record, self._folder, self._live = record, record.folder, live
        config, self._written = load_config(self._folder / "config.yaml")
        self._settings, self._uri = config.tracking, tracking_uri()
        self._client: Any = None
        self._monitor: Any = None

    def send(self, status: str = "") -> int:
        """Send what is missing; with a status also files and the model, and end the run.

        Returns:
            How many lines of numbers and models MLflow did not have.

        Raises:
            Exception: whatever MLflow raises. `send` may be called again.
        """
        try:
            if self._client is None:
                self._connect()
            sent = self._send_lines()
            if status:
                self._send_files()
                self._send_samples()
                sent += self._send_model()
                self._finish(status)
        except Exception:
            self._client = None  # the next call looks at what has arrived
            raise
        return sent

    def _connect(self) -> None:
        """Find the run by its key, or create it; and learn which steps it has."""
        record = self._record
        with _lock(self._uri):
            client = connect(self._uri)
            experiment = self._find_experiment(client)
        key, name = record.facts["key"], hide(self._settings.run_name or self._folder.name)
        runs: list[Any] = list(client.search_runs([experiment], f"tags.run_key = '{key}'"))
        if not runs:
            tags, started = {"run_key": key}, record.facts["started"]
            runs.append(client.create_run(experiment, started, tags, run_name=name))
        self._run_id, self._experiment = runs[0].info.run_id, experiment
        record.update(mlflow=self._run_id, mlflow_experiment=experiment)
        self._describe(client, runs[0])
        if self._live:
            client.update_run(self._run_id, status="RUNNING")
            self._watch_machine()
        points = client.get_metric_history(self._run_id, "learning_rate")
        self._steps, self._offset = {point.step for point in points}, 0
        self._client = client

    def _find_experiment(self, client: Any) -> str:
        name = self._settings.experiment
        if experiment := client.get_experiment_by_name(name):
            return experiment.experiment_id
        location = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):  # MLflow's own is in the current folder
            location = (PROJECT_ROOT / "mlruns").as_uri()
        return client.create_experiment(name, location)

    def _describe(self, client: Any, run: Any) -> None:
        """Parameters, tags and data. MLflow's parameters are final: the first value stays."""
        from mlflow import entities

        tags, known = self._record.facts["tags"], run.data.params
        config = {k: hide(str(v))[:MAX_VALUE] for k, v in flatten(self._written).items()}
        new = [entities.Param(key, config[key]) for key in config if key not in known]
        for part in batched(new, 100):  # as many as MLflow takes in one request
            client.log_batch(self._run_id, params=part)
        client.log_batch(self._run_id, tags=[entities.RunTag(*tag) for tag in tags.items()])
        inputs = []
        for name in ("train", "eval"):
            if digest := tags.get(f"fingerprint.{name}"):
                source = json.dumps({"uri": config[f"data.{name}"]})
                data = entities.Dataset(name, digest, "local", source)
                context = entities.InputTag("mlflow.data.context", name)
                inputs.append(entities.DatasetInput(data, [context]))
        if not run.inputs.dataset_inputs:
            client.log_inputs(self._run_id, inputs)

    def _send_lines(self) -> int:
        """The whole lines of `metrics.jsonl` that are new."""
        path = self._folder / "metrics.jsonl"
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(self._offset)
            lines = [line for line in file if line.endswith(b"\n")]  # the rest is being written
        self._offset += sum(map(len, lines))
        new = [line for line in map(json.loads, lines) if line["step"] not in self._steps]
        for part in batched(new, 50):  # MLflow takes 1000 numbers in one request
            points = [point for line in part for point in _points(line)]
            self._client.log_batch(self._run_id, metrics=points)
        self._steps |= {line["step"] for line in new}
        return len(new)

    def _watch_machine(self) -> None:
        """Let MLflow log the use of CPU, memory, disk and network while the run lives."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self._monitor is None:
            uri = self._uri
            self._monitor = SystemMetricsMonitor(
                self._run_id, resume_logging=True, tracking_uri=uri
            )
            self._monitor.start()

    def _send_files(self) -> None:
        paths = [self._folder / name for name in FILES]
        if self._record.facts["tags"].get("uv.lock") == lock_hash():  # unchanged since the start
            paths.append(PROJECT_ROOT / "uv.lock")
        for path in paths:
            if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
                continue
            if path.suffix == ".png":
                self._client.log_artifact(self._run_id, str(path))
            else:
                self._client.log_text(self._run_id, hide(path.read_text("utf-8")), path.name)

    def _send_samples(self) -> None:
        """The answers as a table that MLflow shows. Its own log_table would append them again."""
        rows = [
            [line["step"], sample["prompt"], sample["answer"]]
            for line in read_metrics(self._folder / "samples.jsonl")
            for sample in line["samples"]
        ]
        if rows:
            table = {"columns": ["step", "prompt", "answer"], "data": rows}
            text = hide(json.dumps(table, ensure_ascii=False))
            self._client.log_text(self._run_id, text, TABLE)
            tag = json.dumps([{"path": TABLE, "type": "table"}])
            self._client.set_tag(self._run_id, "mlflow.loggedArtifacts", tag)

    def _send_model(self) -> int:
        """The result as a model of MLflow's, with the numbers of its step."""
        from mlflow.entities import LoggedModelOutput

        client, run_id, final = self._client, self._run_id, self._folder / "final"
        step = self._record.facts.get("final_step")
        if step is None or not final.is_dir():
            return 0
        name = f"final-{step}"
        same = f"source_run_id = '{run_id}' AND name = '{name}'"
        for model in client.search_logged_models([self._experiment], same):
            if model.status == "READY":
                return 0
            client.delete_logged_model(model.model_id)  # of an upload that failed
        tags = {"folder": str(final)}
        model = client.create_logged_model(self._experiment, name, run_id, tags).model_id
        size = sum(file.stat().st_size for file in final.iterdir())
        if size <= self._settings.max_model_gib * GIB:
            _upload(client, model, final)
        for line in read_metrics(self._folder / "metrics.jsonl"):
            if line["step"] == step:
                client.log_batch(run_id, metrics=_points(line, model_id=model))
        client.log_outputs(run_id, [LoggedModelOutput(model, step)])
        client.finalize_logged_model(model, "READY")
        return 1

    def _finish(self, status: str) -> None:
        facts = self._record.facts
        if "final" in facts:
            self._client.set_tag(self._run_id, "final", facts["final"])
        if self._monitor is not None:
            self._monitor.finish()
        self._client.set_terminated(self._run_id, status, facts.get("ended"))
        self._record.update(sent=status)


def _lock(uri: str) -> AbstractContextManager:
    """Around connecting: two starts on a fresh database both create its tables, and one fails."""
    database = uri.removeprefix("sqlite:///")
    return nullcontext() if database == uri else FileLock(f"{database}.lock")


def _points(line: dict[str, Any], **options: str) -> list[Metric]:
    """A line's numbers, at the time when they were measured: MLflow keeps equal points once."""
    from mlflow.entities import Metric

    step, time = line["step"], int(line.get("time", 0) * 1000)
    return [
        Metric(key, value, time, step, **options)
        for key, value in line.items()
        if key not in {"step", "time"} and value is not None
    ]


def _upload(client: Any, model: str, folder: Path) -> None:
    """Upload a model's files; from its copy of the config, secrets are removed first."""
    with tempfile.TemporaryDirectory() as temporary:
        for file in folder.iterdir():
            copy = Path(temporary) / file.name
            if file.suffix == ".yaml":
                copy.write_text(hide(file.read_text("utf-8")), encoding="utf-8")
            else:
                copy.symlink_to(file.resolve())
        client.log_model_artifacts(model, temporary)


def tracking_uri() -> str:
    """Where runs are sent: MLFLOW_TRACKING_URI, or a database in the project's root.

    MLflow's own default is a database in the current folder.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{PROJECT_ROOT / 'mlflow.db'}"


def connect(uri: str | None = None) -> MlflowClient:
    """A client that gives up within seconds, and prints no address with a password."""
    # MLflow's defaults wait four minutes for a server that refuses, twenty for one that hangs.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(uri or tracking_uri())


def where_to_look(record: Record) -> str:
    """The run's page on a server, or the command that shows a database in a browser."""
    facts, uri = record.facts, tracking_uri()
    if uri.startswith("http"):
        page = ""  # of a run that the server has not heard of
        if "mlflow" in facts:
            page = f"#/experiments/{facts['mlflow_experiment']}/runs/{facts['mlflow']}"
        return f"{hide(uri).replace('***@', '').rstrip('/')}/{page}"
    # The address of another database may hold a password: name the variable that has it.
    address = shlex.quote(uri) if uri.startswith("sqlite:///") else '"$MLFLOW_TRACKING_URI"'
    return f"uv run mlflow ui --backend-store-uri {address}"


def send_evaluation(folder: Path, figures: dict[str, float], files: list[Path]) -> None:
    """Add figures and files to the MLflow run that made what is in `folder`, if there is one."""
    record = Record.find(folder.parent, folder.parent.parent)
    if record is None or "mlflow" not in record.facts:
        return
    run_id = record.facts["mlflow"]
    try:
        client = connect()
        for name, value in figures.items():
            client.log_metric(run_id, f"evaluation_{name}", value)
        for file in files:
            client.log_artifact(run_id, str(file))
    except Exception as error:  # noqa: BLE001 - the files are written in any case
        print(f"warning: MLflow did not take the evaluation ({type(error).__name__})")
