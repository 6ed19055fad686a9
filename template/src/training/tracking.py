"""Send a run's folder to MLflow: nothing twice, and without delaying or stopping the training.

`metrics.jsonl` and the other files are written first. A thread sends them during the run; what
did not arrive, `uv run scripts/sync.py FOLDER` sends later. MLflow takes seconds to import, so
only functions that need it do.
"""

import json
import logging
import os
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from itertools import batched
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from src.config import flatten, load_config
from src.training.record import hide, read_metrics, read_record, update_record
from src.utils.environment import PROJECT_ROOT, to_root
from src.utils.errors import RunError, first_line
from src.utils.files import METRICS
from src.utils.memory import GIB

PAUSE_SECONDS = 2.0  # between two sends: many lines cost a training no more than one does
CLOSE_SECONDS = 20.0  # how long the end of a run waits for a server that may be gone
UPLOAD_SECONDS = 1800.0  # and for one that answers, as models may be large
MAX_VALUE = 500  # characters of a parameter's value, which every MLflow store takes
FILES = ("config.yaml", "samples.jsonl", "left_out.jsonl", "loss.png", "uncommitted.diff")


class Tracker(Thread):
    """A thread that sends what a run has written, every two seconds."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Begin to send the run in this folder; `warn` is called once if MLflow fails."""
        super().__init__(daemon=True)
        self._folder, self._warn, self._warned, self._end = folder, warn, False, Event()
        self.start()

    def close(self) -> None:
        """Send all that is left of a run whose record says how it ended."""
        self._end.set()
        finished = read_record(self._folder)["status"] == "FINISHED"
        self.join(UPLOAD_SECONDS if finished else CLOSE_SECONDS)
        if self.is_alive():
            self._complain("did not answer in time")

    def run(self) -> None:
        """Send until the run has ended, and once more then."""
        sender, ended = None, False
        while not ended:
            ended = self._end.is_set()
            try:
                sender = sender or Sender(self._folder)
                sender.send()
            except Exception as error:  # noqa: BLE001 - tracking must never stop a training
                sender = None  # the next one looks at what has arrived
                self._complain(f"failed ({explain(error)})")
            self._end.wait(PAUSE_SECONDS)  # so the end of the run is always tried, and at once

    def _complain(self, problem: str) -> None:
        if not self._warned:
            folder = shlex.quote(to_root(self._folder))
            command = f"uv run scripts/sync.py {folder}"
            self._warn(f"warning: MLflow {problem}; later, this sends what is missing: {command}")
        self._warned = True


class Sender:
    """Sends one run: the run is found by its key and a line by its step, so nothing comes twice.

    Attributes:
        run_id: MLflow's.
    """

    def __init__(self, folder: Path) -> None:
        """Find the run by its key, or create it; and learn which steps it has.

        Raises:
            Exception: whatever MLflow raises, here and in `send`. `explain` makes a line of it.
        """
        self._folder, facts = folder, read_record(folder)
        config = load_config(self._folder / "config.yaml", stored=True)
        self._settings, uri = config.tracking, tracking_uri()
        # Two starts on a fresh database both create its tables, and one fails.
        with FileLock(PROJECT_ROOT / "mlflow.db.lock") if "sqlite" in uri else nullcontext():
            self._client = client = connect()
            self._experiment = experiment = self._find_experiment()
        from mlflow.entities import Param, RunTag

        key, started = facts["key"], facts["started"]
        name = hide(self._settings.run_name or self._folder.name)[:250]  # that a name may have
        runs = list(client.search_runs([experiment], f"tags.run_key = '{key}'"))
        runs = runs or [client.create_run(experiment, started, {"run_key": key}, run_name=name)]
        self.run_id = runs[0].info.run_id
        update_record(folder, mlflow=self.run_id, mlflow_experiment=experiment)
        client.update_run(self.run_id, status="RUNNING")  # again, where it was stopped
        values = {key: str(value)[:MAX_VALUE] for key, value in flatten(config.written).items()}
        new = values.keys() - runs[0].data.params  # MLflow's are final: the first value stays
        params = [Param(key, values[key]) for key in new]
        tags = [RunTag(*tag) for tag in facts["tags"].items()]
        client.log_batch(self.run_id, params=params, tags=tags)
        points = client.get_metric_history(self.run_id, "learning_rate")
        self._steps, self._offset = {point.step for point in points}, 0

    def send(self) -> int:
        """Send what is missing; of a run that has ended also its files, model and status.

        Returns:
            How many lines of numbers MLflow did not have.
        """
        facts, sent = read_record(self._folder), self._send_lines()
        if facts["status"] != "RUNNING":
            for file in filter(Path.is_file, (self._folder / name for name in FILES)):
                self._client.log_artifact(self.run_id, str(file))
            self._send_model(facts.get("final_step"))
            self._client.set_tag(self.run_id, "final", facts.get("final", "nothing"))
            self._client.set_terminated(self.run_id, facts["status"], facts.get("ended"))
        return sent

    def _find_experiment(self) -> str:
        name, local = self._settings.experiment, not os.environ.get("MLFLOW_TRACKING_URI")
        own = PROJECT_ROOT / "mlruns"  # MLflow's own default is in the current folder
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            return self._client.create_experiment(name, own.as_uri() if local else None)
        if experiment.lifecycle_stage == "deleted":
            restore = f"uv run mlflow experiments restore -x {experiment.experiment_id}"
            raise RunError(f"the experiment {name} was deleted: {restore}")
        files = Path(unquote(urlsplit(experiment.artifact_location).path))
        if local and files.name == own.name and files.resolve() != own.resolve():
            link = shlex.join(["ln", "-s", str(PROJECT_ROOT), str(files.parent)])
            raise RunError(
                f"the experiment {name} has its files in {files}, as this project has moved or is "
                f"a copy: {link}, or another tracking.experiment"
            )
        return experiment.experiment_id

    def _send_lines(self) -> int:
        """The whole lines of `metrics.jsonl` that are new."""
        path = self._folder / METRICS
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(self._offset)
            lines = [line for line in file if line.endswith(b"\n")]  # the rest is being written
        self._offset += sum(map(len, lines))
        new = [line for line in map(json.loads, lines) if line["step"] not in self._steps]
        for part in batched(new, 50):  # MLflow takes 1000 numbers in one request
            points = [point for line in part for point in _points(line)]
            self._client.log_batch(self.run_id, metrics=points)
        return len(new)

    def _send_model(self, step: int | None) -> None:
        """The result as a model of MLflow's, with the numbers of its step."""
        client, run_id, final = self._client, self.run_id, self._folder / "final"
        if step is None or not final.is_dir():
            return
        name, tags = f"final-{step}", {"folder": str(final)}
        same = f"source_run_id = '{run_id}' AND name = '{name}'"
        models = list(client.search_logged_models([self._experiment], same))
        models = models or [client.create_logged_model(self._experiment, name, run_id, tags)]
        if models[0].status == "READY":
            return
        model = models[0].model_id
        size = sum(file.stat().st_size for file in final.iterdir())
        if size <= self._settings.max_model_gib * GIB:
            client.log_model_artifacts(model, str(final))
        for line in read_metrics(self._folder / METRICS):
            if line["step"] == step:
                client.log_batch(run_id, metrics=_points(line, model_id=model))
        client.finalize_logged_model(model, "READY")


def explain(error: Exception) -> str:
    """What MLflow says: its messages may repeat an address with user and password."""
    return hide(first_line(error))


def _points(line: dict[str, Any], **options: str) -> list[Any]:
    """A line as Metrics, at the time when it was measured: MLflow keeps equal points once."""
    from mlflow.entities import Metric

    step, time = line["step"], int(line.get("time", 0) * 1000)
    return [
        Metric(key, value, time, step, **options)
        for key, value in line.items()
        if key not in {"step", "time"} and value is not None
    ]


def tracking_uri() -> str:
    """Where runs are sent: MLFLOW_TRACKING_URI, or a database in the project's root.

    MLflow's own default is a database in the current folder.
    """
    path = str(PROJECT_ROOT / "mlflow.db").replace("%", "%25").replace("?", "%3F")  # as in a URL
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{path}"


def connect() -> Any:
    """An MlflowClient that gives up within seconds, and prints no address with a password."""
    # MLflow's defaults wait four minutes for a server that refuses, twenty for one that hangs.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(tracking_uri())


def where_to_look(folder: Path) -> str:
    """The run's page on a server, or the command that shows a database in a browser."""
    facts, uri = read_record(folder), tracking_uri()
    if uri.startswith("http"):
        page = "#/experiments/{mlflow_experiment}/runs/{mlflow}" if "mlflow" in facts else ""
        return f"{hide(uri).replace('***@', '').rstrip('/')}/{page.format_map(facts)}"
    # The address of another database may hold a password: name the variable that has it.
    address = shlex.quote(uri) if uri.startswith("sqlite:///") else '"$MLFLOW_TRACKING_URI"'
    return f"uv run mlflow ui --backend-store-uri {address}"
