"""Send a run to MLflow from a thread of its own, without ever holding up or stopping the training.

MLflow gets what is in the run's folder already, so nothing is lost with a server: whatever did not
arrive, `uv run scripts/sync.py FOLDER` sends later.
"""

from __future__ import annotations

import logging
import os
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from src.training.record import Record, hide
from src.utils.environment import PROJECT_ROOT, to_root

if TYPE_CHECKING:
    from mlflow import MlflowClient

PAUSE_SECONDS = 2.0  # between two sends: many lines cost a training no more than one does
RETRY_SECONDS = 30.0  # after a failure, until MLflow is asked again
CLOSE_SECONDS = 20.0  # how long the end of a run waits for a server that may be gone
UPLOAD_SECONDS = 1800.0  # and for one that answers, as models may be large


class Tracker:
    """The thread that brings MLflow what a run has written, whenever there is more of it."""

    def __init__(self, record: Record, warn: Callable[[str], None] = print) -> None:
        """Begin; returns at once.

        Args:
            record: of the run, in whose folder all that is sent lies.
            warn: called once if MLflow cannot be reached.
        """
        self._record, self._warn, self._warned = record, warn, False
        self._news, self._hurry = threading.Event(), threading.Event()
        self._closing, self._failed = "", 0.0
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow")
        self.wake()
        self._thread.start()

    def wake(self) -> None:
        """Say that the folder has more; never waits."""
        self._news.set()

    def close(self, status: str) -> None:
        """Send all that is left, and that the run is FINISHED, FAILED or KILLED."""
        self._closing = status
        self._hurry.set()
        self.wake()
        self._thread.join(UPLOAD_SECONDS if status == "FINISHED" else CLOSE_SECONDS)
        if self._thread.is_alive():
            self._complain("did not answer in time")

    def _work(self) -> None:
        from src.training.sending import Sender  # imports MLflow, which takes seconds

        sender = Sender(self._record, live=True)
        closing = ""
        while not closing:
            self._news.wait()
            self._news.clear()
            closing = self._closing
            waiting = self._failed and time.monotonic() - self._failed < RETRY_SECONDS
            if waiting and not closing:  # the end is always tried
                continue
            try:
                sender.send(closing)
                self._failed = 0.0
                self._hurry.wait(PAUSE_SECONDS)
            except Exception as error:  # noqa: BLE001 - tracking must never stop a training
                # Its type alone: MLflow's messages repeat the URI with user and password.
                self._complain(f"failed ({type(error).__name__})")
                self._failed = time.monotonic()

    def _complain(self, what: str) -> None:
        if not self._warned:
            command = f"uv run scripts/sync.py {shlex.quote(to_root(self._record.folder))}"
            self._warn(f"warning: MLflow {what}; what is missing there, this sends: {command}")
        self._warned = True


def tracking_uri() -> str:
    """Where runs are sent: MLFLOW_TRACKING_URI, or a database of the project.

    MLflow's own default is one in whatever folder you are in.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{PROJECT_ROOT / 'mlflow.db'}"


def where_to_look(record: Record) -> str:
    """What shows the run in a browser: a server's page, or the command that starts a server."""
    facts, uri = record.facts, tracking_uri()
    if uri.startswith("http"):
        page = ""  # of a run that the server has not heard of
        if "mlflow" in facts:
            page = f"#/experiments/{facts['mlflow_experiment']}/runs/{facts['mlflow']}"
        return f"{hide(uri).replace('***@', '').rstrip('/')}/{page}"
    # A database's address may hold a password, and whoever reads this has it in the environment.
    own = shlex.quote(uri) if uri.startswith("sqlite:///") else '"$MLFLOW_TRACKING_URI"'
    return f"uv run mlflow ui --backend-store-uri {own}"


def connect(uri: str | None = None) -> MlflowClient:
    """A client that gives up within seconds, and prints nothing of an address with a password."""
    # Its own defaults wait four minutes for a server that refuses, twenty for one that hangs.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return MlflowClient(uri or tracking_uri())


def send_evaluation(folder: Path, figures: dict[str, float], files: list[Path]) -> None:
    """Add figures and files to the MLflow run that made what is in `folder`, if there is one."""
    record = Record.find(folder.parent, folder.parent.parent)
    if record is None or (run_id := record.facts.get("mlflow")) is None:
        return
    try:
        client = connect()
        for name, value in figures.items():
            client.log_metric(run_id, f"evaluation_{name}", value)
        for file in files:
            client.log_artifact(run_id, str(file))
    except Exception as error:  # noqa: BLE001 - the files are written in any case
        print(f"warning: MLflow did not take it ({type(error).__name__})")
