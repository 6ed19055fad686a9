"""`record.json` in a run's folder: where the run comes from and how it ended, for any tracker."""

import hashlib
import json
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from src.training.provenance import hide, provenance, uncommitted
from src.utils.files import RECORD, write_text


class Record:
    """Facts of one run, on disk as soon as they are known.

    Attributes:
        facts: key (this run's name for itself), started (ms since 1970), status (RUNNING,
            FINISHED, FAILED or KILLED), tags (see `provenance`), data (name, source and
            fingerprint of each dataset), sent (the status, once MLflow has all), and what else was
            told.
    """

    def __init__(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """The record in a folder; or a new one of these facts, written by its first update."""
        text = "" if facts else (folder / RECORD).read_text("utf-8")
        self.folder, self.facts = folder, facts or json.loads(text)
        self._lock = threading.Lock()  # the thread that sends has something to tell too

    @classmethod
    def start(
        cls, folder: Path, written: dict[str, Any], data: Sequence[tuple[str, str, str]], step: int
    ) -> Self:
        """The record of a run that begins now, or at `step` goes on with the one in its folder."""
        facts: dict[str, Any] = {"key": uuid.uuid4().hex, "started": int(time.time() * 1000)}
        if earlier := cls.find(folder):
            # From step 0 it is another run, and who was killed before it cannot say so any more.
            kept = ("key", "started", "abandoned") if step else ()
            facts |= {key: earlier.facts[key] for key in kept if key in earlier.facts}
            if not step and earlier.facts["status"] == "RUNNING":
                facts["abandoned"] = earlier.facts["key"]
        tags = provenance() | {"config": hashlib.sha256(_text(written)).hexdigest()[:16]}
        tags |= {f"fingerprint.{name}": digest[:16] for name, _, digest in data}
        record = cls(folder, facts)
        record.update(status="RUNNING", tags=tags, data=[[*map(hide, told)] for told in data])
        if changes := uncommitted():
            write_text(folder / "uncommitted.diff", changes)
        return record

    @classmethod
    def find(cls, *folders: Path) -> Self | None:
        """The record in the first of these folders that has one."""
        return next((cls(folder) for folder in folders if (folder / RECORD).is_file()), None)

    def update(self, **facts: Any) -> None:
        """Add or change facts, on disk too."""
        with self._lock:
            self.facts |= facts
            write_text(self.folder / RECORD, json.dumps(self.facts, indent=1) + "\n")


def _text(written: dict[str, Any]) -> bytes:
    """A config without the name of its folder: two runs of one config have the same hash."""
    return json.dumps(written | {"output_dir": ""}, sort_keys=True).encode()
