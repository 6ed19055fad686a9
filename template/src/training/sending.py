"""Bring MLflow to hold what a run's folder holds: nothing missing, nothing twice.

A run is found by its own key and a line by its step, so that sending may fail at any moment and
begin again: while the run lives, when it is resumed, or a week later.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import entities
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from src.config import flatten, load_config
from src.training.checkpoint import MOMENTS
from src.training.record import Record, hide
from src.training.tracking import connect, tracking_uri
from src.utils.environment import PROJECT_ROOT
from src.utils.memory import GIB

LIMIT = 500  # characters of a parameter's value, which every MLflow store takes
AT_ONCE = 1000  # metrics that MLflow takes in one request
MOST_BYTES = 10_000_000  # of a file that is sent along
FILES = ("config.yaml", "samples.jsonl", "left_out.jsonl", "loss.png", "uncommitted.diff")
TABLE = "samples.json"


class Sender:
    """One run's way to MLflow. Whatever its methods raise, `send` may be called again."""

    def __init__(self, record: Record, live: bool = False) -> None:
        """Prepare; nothing is sent yet.

        Args:
            record: of the run.
            live: whether the run is going on in this process, whose machine is then watched.
        """
        self._record, self._folder, self._live = record, record.folder, live
        self._uri = tracking_uri()  # for good: whatever changes later, this run stays in one place
        config, self._written = load_config(self._folder / "config.yaml")
        self._settings = config.tracking
        self._client: Any = None
        self._run_id = self._experiment = ""
        self._watcher: SystemMetricsMonitor | None = None

    def send(self, status: str = "") -> int:
        """Send what is missing; with a status also models and files, and end the run.

        Returns:
            How many lines of numbers and models MLflow did not have.
        """
        try:
            if self._client is None:
                self._connect()
            sent = self._send_lines()
            if status:
                sent += self._conclude(status)
        except Exception:
            self._client = None  # so that the next time looks what has arrived
            raise
        return sent

    def _connect(self) -> None:
        """Find the run by its key, or create it; and learn which steps it has."""
        uri, facts = self._uri, self._record.facts
        database = Path(uri.removeprefix("sqlite:///"))
        # Two first starts on a fresh database both create its tables, and one of them fails.
        own = uri.startswith("sqlite:///")
        with FileLock(database.with_name(f"{database.name}.lock")) if own else nullcontext():
            client = connect(uri)
            name = self._settings.experiment
            if found := client.get_experiment_by_name(name):
                self._experiment = found.experiment_id
            else:
                beside = (PROJECT_ROOT / "mlruns").as_uri()
                folder = None if os.environ.get("MLFLOW_TRACKING_URI") else beside
                self._experiment = client.create_experiment(name, folder)
        known = self._runs(client, facts["key"]) or [self._create(client)]
        run, self._run_id = known[0], known[0].info.run_id
        self._record.update(mlflow=self._run_id, mlflow_experiment=self._experiment)
        self._describe(client, run)
        if self._live:
            client.update_run(self._run_id, status="RUNNING")
        points = client.get_metric_history(self._run_id, "learning_rate")
        self._steps, self._read = {point.step for point in points}, 0
        self._client = client

    def _runs(self, client: Any, key: str | None) -> list[Any]:
        wanted = f"tags.run_key = '{key}'"
        return list(client.search_runs([self._experiment], wanted)) if key else []

    def _create(self, client: Any) -> Any:
        name = self._settings.run_name or self._folder.name
        tags = {"run_key": self._record.facts["key"]}
        return client.create_run(
            self._experiment, self._record.facts["started"], tags=tags, run_name=hide(name)
        )

    def _describe(self, client: Any, run: Any) -> None:
        """Parameters, tags and data; what a resumed run has changed of the parameters is a tag."""
        flat = {k: hide(str(v))[:LIMIT] for k, v in flatten(self._written).items()}
        known = run.data.params
        tags = self._record.facts["tags"] | {
            f"changed.{k}": v for k, v in flat.items() if k in known and known[k] != v
        }
        new = [entities.Param(k, v) for k, v in flat.items() if k not in known]
        for start in range(0, len(new), 100):  # which MLflow takes in one request
            client.log_batch(self._run_id, params=new[start : start + 100])
        client.log_batch(self._run_id, tags=[entities.RunTag(k, v) for k, v in tags.items()])
        if not run.inputs.dataset_inputs:
            client.log_inputs(self._run_id, [
                entities.DatasetInput(
                    entities.Dataset(name, digest[:36], "local", json.dumps({"uri": source})),
                    [entities.InputTag("mlflow.data.context", name)],
                )
                for name, source, digest in self._record.facts["data"]
            ])  # fmt: skip

    def _send_lines(self) -> int:
        """The whole lines of `metrics.jsonl` that are new, many at once."""
        new = [line for line in self._lines() if line["step"] not in self._steps]
        batch: list[entities.Metric] = []
        for line in new:
            points = self._points(line)
            if len(batch) + len(points) > AT_ONCE:
                self._client.log_batch(self._run_id, metrics=batch)
                batch = []
            batch += points
        if batch:
            self._client.log_batch(self._run_id, metrics=batch)
        self._steps |= {line["step"] for line in new}
        if self._live and self._watcher is None:
            self._watcher = SystemMetricsMonitor(
                self._run_id, resume_logging=True, tracking_uri=self._uri
            )
            self._watcher.start()
        return len(new)

    def _lines(self) -> Iterator[dict[str, Any]]:
        path = self._folder / "metrics.jsonl"
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if line.endswith(b"\n"):  # else it is being written
                    self._read += len(line)
                    yield json.loads(line)

    def _points(self, line: dict[str, Any], **of: str) -> list[entities.Metric]:
        """A line's numbers, at the time when they were measured: MLflow keeps equal points once."""
        step, when = line["step"], int(line.get("time", 0) * 1000)
        numbers = {k: v for k, v in line.items() if k not in {"step", "time"} and v is not None}
        return [entities.Metric(k, float(v), when, step, **of) for k, v in numbers.items()]

    def _conclude(self, status: str) -> int:
        for name in FILES:
            path = self._folder / name
            if path.is_file() and path.stat().st_size <= MOST_BYTES:
                self._send_file(path)
        lock = PROJECT_ROOT / "uv.lock"
        digest = sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "none"
        if digest.startswith(self._record.facts["tags"].get("uv.lock", "-")):  # as it was then
            self._send_file(lock)
        self._send_samples()
        # A run that was stopped will go on, and prune its checkpoints; later nobody knows.
        models = self._send_models() if status == "FINISHED" or not self._live else 0
        if told := self._record.facts.get("final"):
            self._client.set_tag(self._run_id, "final", told)
        if self._watcher is not None:
            self._watcher.finish()
        ended = self._record.facts.get("ended")
        self._client.set_terminated(self._run_id, status, ended)
        self._record.update(sent=status)
        return models

    def _send_file(self, path: Path) -> None:
        """Store a file as an artifact, what is text in it without secrets."""
        if path.suffix == ".png":
            self._client.log_artifact(self._run_id, str(path))
        else:
            self._client.log_text(self._run_id, hide(path.read_text("utf-8")), path.name)

    def _send_samples(self) -> None:
        """The answers as a table that MLflow shows. Its own log_table would append them again."""
        path = self._folder / "samples.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        rows = [
            [line["step"], asked["prompt"], asked["answer"]]
            for line in map(json.loads, lines)
            for asked in line["samples"]
        ]
        if rows:
            columns = ["step", "prompt", "answer"]
            text = json.dumps({"columns": columns, "data": rows}, ensure_ascii=False)
            self._client.log_text(self._run_id, hide(text), TABLE)
            tag = json.dumps([{"path": TABLE, "type": "table"}])
            self._client.set_tag(self._run_id, "mlflow.loggedArtifacts", tag)

    def _send_models(self) -> int:
        """Each kept checkpoint and the result as a logged model, with its evaluation."""
        self._read = 0
        lines = {line["step"]: line for line in self._lines()}
        filters = f"source_run_id = '{self._run_id}'"
        known = self._client.search_logged_models([self._experiment], filters)
        ready = {model.name for model in known if model.status == "READY"}
        for model in known:
            if model.status != "READY":  # of an attempt that failed
                self._client.delete_logged_model(model.model_id)
        new = [found for found in self._models() if found[0] not in ready]
        for name, step, folder, files in new:
            tags = {"step": str(step), "folder": str(folder)}
            model = self._client.create_logged_model(
                self._experiment, name, self._run_id, tags, model_type="causal-lm"
            ).model_id
            if sum(file.stat().st_size for file in files) <= self._settings.max_model_gib * GIB:
                self._upload(model, files)
            if step in lines:
                self._client.log_batch(self._run_id, self._points(lines[step], model_id=model))
            outputs = [entities.LoggedModelOutput(model, step)]
            self._client.log_outputs(self._run_id, outputs)
            self._client.finalize_logged_model(model, "READY")
        return len(new)

    def _models(self) -> Iterator[tuple[str, int, Path, list[Path]]]:
        """Name, step, folder and files of all that can be asked, each step once."""
        final, held = self._folder / "final", self._record.facts.get("final_step")
        if final.is_dir() and held is not None:
            yield f"final-{held}", held, final, [*final.iterdir()]
        for path in sorted((self._folder / "checkpoints").glob("step-*")):
            if (step := int(path.name.removeprefix("step-"))) != held:
                # Not the optimizer's moments: with them it would be three times as large.
                kept = [file for file in path.iterdir() if file.name != MOMENTS]
                yield f"checkpoint-{step}", step, path, [*kept, self._folder / "config.yaml"]

    def _upload(self, model: str, files: Iterable[Path]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for file in files:
                link = Path(folder) / file.name
                if file.suffix == ".yaml":  # the run's config
                    link.write_text(hide(file.read_text("utf-8")), encoding="utf-8")
                else:
                    link.symlink_to(file.resolve())
            self._client.log_model_artifacts(model, folder)
