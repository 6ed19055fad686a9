"""What a run's folder says of the run: `record.json` (where it comes from), and lines of JSON.

Secrets are hidden before anything is written to `record.json` or `uncommitted.diff`.
"""

import getpass
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
import yaml

from src.utils.environment import PROJECT_ROOT
from src.utils.files import RECORD, write_text

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "datasets")
MAX_DIFF = 1_000_000  # characters of uncommitted changes that are kept
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.I)
SECRET_SHAPES = re.compile(
    r"\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{20,}|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s@]+(?=@)"
)


class Record:
    """Facts of one run, on disk as soon as they are known.

    Attributes:
        folder: the run's.
        facts: key (identifies the run), started (ms since 1970), status (RUNNING, FINISHED, FAILED
            or KILLED), tags (see `provenance`), and what `update` adds: ended, final, final_step,
            mlflow and mlflow_experiment (ids), sent (the status, once MLflow has all).
    """

    def __init__(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Read the record of a folder; given facts, make a new one, which `update` writes."""
        text = "" if facts else (folder / RECORD).read_text("utf-8")
        self.folder, self.facts = folder, facts or json.loads(text)
        self._lock = threading.Lock()  # the thread that sends to MLflow updates it too

    @classmethod
    def find(cls, *folders: Path) -> Self | None:
        """The record in the first of these folders that has one."""
        return next((cls(folder) for folder in folders if (folder / RECORD).is_file()), None)

    @classmethod
    def start(
        cls, folder: Path, written: dict[str, Any], fingerprints: dict[str, str], step: int
    ) -> Self:
        """Write the record of a run that begins; from a step above 0 it continues the earlier one.

        Args:
            folder: the run's.
            written: its config as plain data.
            fingerprints: of its data, by name: train, eval.
            step: where it begins.
        """
        facts: dict[str, Any] = {"key": uuid.uuid4().hex, "started": int(time.time() * 1000)}
        if step and (earlier := cls.find(folder)):
            facts = {name: earlier.facts[name] for name in facts}
        config = json.dumps(written | {"output_dir": ""}, sort_keys=True)  # equal in any folder
        tags = provenance() | {"config": _hash(config.encode())}
        tags |= {f"fingerprint.{name}": digest[:16] for name, digest in fingerprints.items()}
        record = cls(folder, facts)
        record.update(status="RUNNING", tags=tags)
        if changes := uncommitted():
            write_text(folder / "uncommitted.diff", changes)
        return record

    def update(self, **facts: Any) -> None:
        """Add or change facts, on disk too."""
        with self._lock:
            self.facts |= facts
            write_text(self.folder / RECORD, json.dumps(self.facts, indent=1) + "\n")


def hide(text: str) -> str:
    """Replace the environment's secrets, and what looks like a token or a login, by ***."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return SECRET_SHAPES.sub("***", text)


def provenance() -> dict[str, str]:
    """Code, lock, template, machine and command line of this process, as tags for MLflow."""
    changed = git(PROJECT_ROOT, "status", "--porcelain")
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git(PROJECT_ROOT, "rev-parse", "HEAD"),
        "git.dirty": str(bool(changed)).lower() if changed is not None else None,
        "command": shlex.join(["uv", "run", *sys.argv]),
        "python": sys.version.split()[0],
        "template": _template_version(),
        "uv.lock": lock_hash(),
    }
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            tags[name] = version(name)
    with suppress(OSError, KeyError):  # no user name in some containers
        tags["mlflow.user"] = getpass.getuser()
    if torch.cuda.is_available():
        tags["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {key: hide(value)[:500] for key, value in tags.items() if value}


def uncommitted() -> str:
    """The changes since the last commit, cut where they are long."""
    return hide((git(PROJECT_ROOT, "diff", "HEAD") or "")[:MAX_DIFF])


def lock_hash() -> str | None:
    """The start of uv.lock's SHA-256; None without the file."""
    lock = PROJECT_ROOT / "uv.lock"
    return _hash(lock.read_bytes()) if lock.is_file() else None


def git(root: Path, *words: str) -> str | None:
    """What a git command prints in a folder; None where it fails, or there is no git."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", *words], cwd=root, check=True, capture_output=True, text=True, timeout=20
        )
        return done.stdout.strip()
    return None


def _template_version() -> str | None:
    """The template's version that rendered this project; None where no file says it."""
    with suppress(OSError, yaml.YAMLError):  # no such file, or one with conflict markers
        answers = yaml.safe_load((PROJECT_ROOT / ".copier-answers.yml").read_text("utf-8"))
        return str(answers["_commit"]) if answers and "_commit" in answers else None
    return None


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
