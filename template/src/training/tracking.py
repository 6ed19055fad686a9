"""Send parameters and metrics to MLflow without ever holding up, or stopping, the training.

Everything goes through a queue to one background thread. A server that is down costs a run
one warning; `metrics.jsonl` has every number in any case.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from src.utils.environment import PROJECT_ROOT

LIMIT = 500  # characters of a parameter's value, which every MLflow store takes
CLOSE_SECONDS = 20.0  # how long the end of a run waits for what is still queued


class Tracker:
    """One MLflow run.

    Attributes:
        run_id: MLflow's id once the run has started; a checkpoint keeps it.
    """

    def __init__(
        self,
        experiment: str,
        run_name: str,
        params: dict[str, Any],
        run_id: str | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        """Start, or with `run_id` continue, a run; returns at once.

        Args:
            experiment: made if it does not exist.
            run_name: shown in the list of runs.
            params: the configuration, nested as it is.
            run_id: of the run to continue.
            warn: called once if MLflow cannot be reached.
        """
        self.run_id = run_id
        self._warn, self._failed = warn, False
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._last_step = -1
        self._queue.put(lambda: self._start(experiment, run_name, params))
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow")
        self._thread.start()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Queue one line of numbers."""
        now = int(time.time() * 1000)
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        self._queue.put(lambda: self._send(numbers, now, step))

    def close(self, status: str = "FINISHED") -> None:
        """Send what is queued and end the run as FINISHED, FAILED or KILLED."""
        self._queue.put(lambda: self._client.set_terminated(str(self.run_id), status))
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn("MLflow did not answer in time; metrics.jsonl has all numbers")

    def _work(self) -> None:
        while task := self._queue.get():
            if self._failed:
                continue
            try:
                task()
            except Exception as error:  # noqa: BLE001 - tracking must never stop a training
                self._failed = True
                # Its type alone: MLflow's messages repeat the URI with user and password.
                self._warn(
                    f"MLflow failed ({type(error).__name__}) and gets no more of this run; "
                    "metrics.jsonl has all numbers"
                )

    def _start(self, experiment: str, run_name: str, params: dict[str, Any]) -> None:
        # Its own defaults wait four minutes for a server that refuses, twenty for one that hangs.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from filelock import FileLock
        from mlflow import MlflowClient
        from mlflow.entities import Param

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri()
        # Two first starts on a fresh database both create its tables, and one of them fails.
        with FileLock(PROJECT_ROOT / "mlflow.db.lock"):
            self._client = MlflowClient(uri)
            found = self._client.get_experiment_by_name(experiment)
            local = uri == tracking_uri()
            folder = (PROJECT_ROOT / "mlruns").as_uri() if local else None
            experiment_id = (
                found.experiment_id
                if found
                else self._client.create_experiment(experiment, artifact_location=folder)
            )
        if self.run_id:
            self._client.update_run(self.run_id, status="RUNNING")
            # The steps after the checkpoint are taken again; MLflow would store both.
            history = self._client.get_metric_history(self.run_id, "loss")
            self._last_step = max((point.step for point in history), default=-1)
            return
        self.run_id = self._client.create_run(experiment_id, run_name=run_name).info.run_id
        flat = [Param(key, str(value)[:LIMIT]) for key, value in flatten(params).items()]
        self._client.log_batch(self.run_id, params=flat)

    def _send(self, numbers: dict[str, float], timestamp: int, step: int) -> None:
        from mlflow.entities import Metric

        if step > self._last_step:
            points = [Metric(k, v, timestamp, step) for k, v in numbers.items() if k != "step"]
            self._client.log_batch(str(self.run_id), metrics=points)


def tracking_uri() -> str:
    """The project's own store. MLflow's default is one in whatever folder you are in."""
    return f"sqlite:///{PROJECT_ROOT / 'mlflow.db'}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
