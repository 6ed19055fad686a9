"""Send a run's config and log lines to MLflow, without ever holding up or stopping the training.

A background thread does all of it. A server that is down costs a run one warning;
`metrics.jsonl` has every number in any case.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import flatten
from src.training.provenance import hide, provenance, uncommitted
from src.utils.environment import PROJECT_ROOT

if TYPE_CHECKING:
    from mlflow import MlflowClient

LIMIT = 500  # characters of a parameter's value, which every MLflow store takes
CLOSE_SECONDS = 20.0  # how long the end of a run waits for what is still queued


class Tracker:
    """One MLflow run.

    Attributes:
        run_id: MLflow's id once the run has started; a checkpoint keeps it.
    """

    def __init__(
        self, experiment: str, run_name: str, params: dict[str, Any], run_id: str | None = None,
        warn: Callable[[str], None] = print, data: Sequence[tuple[str, str, str]] = (),
    ) -> None:  # fmt: skip
        """Start, or with `run_id` continue, a run; returns at once.

        Args:
            experiment: made if it does not exist.
            run_name: shown in the list of runs.
            params: the configuration, nested as it is.
            run_id: of the run to continue.
            warn: called once if MLflow cannot be reached.
            data: name, source and fingerprint of each dataset.
        """
        self.run_id = run_id
        self._warn, self._status, self._data = warn, "FINISHED", data
        self._files: list[Path] = []
        self._lines: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue()
        self._thread = threading.Thread(
            target=self._send, args=(experiment, run_name, params), daemon=True, name="mlflow"
        )
        self._thread.start()

    def log(self, metrics: dict[str, Any]) -> None:
        """Queue one line of `metrics.jsonl`."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        self._lines.put((int(time.time() * 1000), numbers))

    def tag(self, name: str, text: str) -> None:
        """Queue a tag of the run."""
        self._lines.put((0, {name: text}))

    def close(self, status: str, files: Sequence[Path] = ()) -> None:
        """Send what is queued and these files; end the run as FINISHED, FAILED or KILLED."""
        self._status, self._files = status, [file for file in files if file.is_file()]
        self._lines.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn("MLflow did not answer in time; metrics.jsonl has all numbers")

    def _send(self, experiment: str, run_name: str, params: dict[str, Any]) -> None:
        """What the thread does, from the start of the run to its end."""
        try:
            from mlflow.entities import Metric

            client, last = self._start(experiment, run_name, params)
            while (line := self._lines.get()) is not None:
                timestamp, numbers = line
                if not timestamp:
                    for key, text in numbers.items():
                        client.set_tag(str(self.run_id), key, text)
                    continue
                step = int(numbers.pop("step"))
                if step > last:
                    points = [Metric(k, v, timestamp, step) for k, v in numbers.items()]
                    client.log_batch(str(self.run_id), metrics=points)
            self._keep(client)
            client.set_terminated(str(self.run_id), self._status)
        except Exception as error:  # noqa: BLE001 - tracking must never stop a training
            # Its type alone: MLflow's messages repeat the URI with user and password.
            what = f"MLflow failed ({type(error).__name__}) and gets no more of this run"
            self._warn(f"{what}; metrics.jsonl has all numbers")

    def _keep(self, client: MlflowClient) -> None:
        """Store the run's files as artifacts, what is text in them without secrets."""
        for file in self._files:
            if file.suffix == ".png":
                client.log_artifact(str(self.run_id), str(file))
            else:
                client.log_text(str(self.run_id), hide(file.read_text("utf-8")), file.name)
        if changes := uncommitted():
            client.log_text(str(self.run_id), changes, "uncommitted.diff")

    def _start(
        self, experiment: str, run_name: str, params: dict[str, Any]
    ) -> tuple[MlflowClient, int]:
        """Connect, and begin or continue the run; returns the last step that it has already."""
        # Its own defaults wait four minutes for a server that refuses, twenty for one that hangs.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from filelock import FileLock
        from mlflow import MlflowClient
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # Two first starts on a fresh database both create its tables, and one of them fails.
        with FileLock(PROJECT_ROOT / "mlflow.db.lock"):
            client = MlflowClient(tracking_uri())
            own = not os.environ.get("MLFLOW_TRACKING_URI")
            folder = (PROJECT_ROOT / "mlruns").as_uri() if own else None
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else client.create_experiment(experiment, folder)
        tags = [RunTag(key, text) for key, text in provenance().items()]
        if self.run_id:
            client.log_batch(self.run_id, tags=tags)
            client.update_run(self.run_id, status="RUNNING")
            # The steps after the checkpoint are taken again; MLflow would store both.
            history = client.get_metric_history(self.run_id, "loss")
            return client, max((point.step for point in history), default=-1)
        self.run_id = client.create_run(number, run_name=hide(run_name)).info.run_id
        flat = [Param(key, hide(str(value))[:LIMIT]) for key, value in flatten(params).items()]
        client.log_batch(self.run_id, params=flat, tags=tags)
        client.log_inputs(self.run_id, [
            DatasetInput(
                Dataset(name, digest[:36], "local", json.dumps({"uri": source})),
                [InputTag("mlflow.data.context", name)],
            )
            for name, source, digest in self._data
        ])  # fmt: skip
        return client, -1


def tracking_uri() -> str:
    """Where runs are sent: MLFLOW_TRACKING_URI, or a database of the project.

    MLflow's own default is one in whatever folder you are in.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{PROJECT_ROOT / 'mlflow.db'}"


def send_evaluation(folder: Path, figures: dict[str, float], files: list[Path]) -> None:
    """Add figures and files to the MLflow run that made what is in `folder`, if there is one."""
    records = sorted(folder.parent.glob("checkpoints/step-*/run.json"))
    run_id = json.loads(records[-1].read_text())["state"]["tracking_run"] if records else None
    if run_id is None:
        return
    try:
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri())
        for name, value in figures.items():
            client.log_metric(run_id, f"evaluation_{name}", value)
        for file in files:
            client.log_artifact(run_id, str(file))
    except Exception as error:  # noqa: BLE001 - the files are written in any case
        print(f"warning: MLflow did not take it ({type(error).__name__})")
