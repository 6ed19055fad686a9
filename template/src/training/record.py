"""What a run's folder says of the run: its configuration, where it comes from, how it ended.

Secrets are hidden before anything is written, so that the folder and its result can be shared.
"""

import getpass
import hashlib
import json
import os
import re
import shlex
import sys
import threading
import time
import uuid
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, SubprocessError, check_output
from typing import Any, Self

import yaml
from omegaconf import OmegaConf

from src.utils.environment import PROJECT_ROOT
from src.utils.errors import UserError
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
            or KILLED), tags (see `provenance`; and the fingerprints of the data), and what
            `update` adds: ended, final, final_step, mlflow and mlflow_experiment (ids).
    """

    def __init__(self, folder: Path, facts: dict[str, Any] | None = None) -> None:
        """Read the record of a folder; given facts, make a new one, which `update` writes."""
        text = "" if facts else (folder / RECORD).read_text("utf-8")
        try:
            self.folder, self.facts = folder, facts or dict(json.loads(text))
            self.facts["key"], self.facts["started"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / RECORD}: is damaged: {error}") from None
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
            written: its config as plain data, for `config.yaml`.
            fingerprints: tags that say which data it has.
            step: where it begins.
        """
        facts: dict[str, Any] = {"key": uuid.uuid4().hex, "started": int(time.time() * 1000)}
        if step and (earlier := cls.find(folder)):
            facts = {name: earlier.facts[name] for name in facts}
            held = earlier.facts.get("final_step")
            if held and held <= step:  # else that step is taken again
                facts["final_step"] = held
        tags = provenance() | fingerprints
        if "mlflow.source.git.commit" not in tags and (PROJECT_ROOT / ".git").exists():
            print(f"warning: {RECORD} has no commit, because git fails here: see `git status`")
        write_text(folder / "config.yaml", OmegaConf.to_yaml(hide(written)))
        record = cls(folder, facts)
        record.update(status="RUNNING", tags=tags)
        if changes := git("diff", "HEAD"):
            write_text(folder / "uncommitted.diff", hide(changes[:MAX_DIFF]))
        return record

    def update(self, **facts: Any) -> None:
        """Add or change facts, on disk too."""
        with self._lock:
            self.facts |= facts
            write_text(self.folder / RECORD, json.dumps(self.facts, indent=1) + "\n")


def hide(value: Any) -> Any:
    """Replace the environment's secrets, and what looks like a token or a login, by ***.

    Args:
        value: a text; or a dict or list, for a copy with all its texts so.
    """
    if isinstance(value, dict):
        return {key: hide(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hide(inner) for inner in value]
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if SECRET_NAMES.search(name) and len(secret) >= 8:
            value = value.replace(secret, "***")
    return SECRET_SHAPES.sub("***", value)


def provenance() -> dict[str, str]:
    """Code, lock, template, machine and command line of this process, as tags for MLflow."""
    changed, lock = git("status", "--porcelain"), PROJECT_ROOT / "uv.lock"
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git("rev-parse", "HEAD"),
        "git.dirty": str(bool(changed)).lower() if changed is not None else None,
        "command": shlex.join(["uv", "run", *sys.argv]),
        "python": sys.version.split()[0],
        "uv.lock": hashlib.sha256(lock.read_bytes()).hexdigest()[:16] if lock.is_file() else None,
    }
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            tags[name] = version(name)
    # The template's version; no such file, or one with conflict markers or without this answer.
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        answers = yaml.safe_load((PROJECT_ROOT / ".copier-answers.yml").read_text("utf-8"))
        tags["template"] = str(answers["_commit"])
    with suppress(OSError, KeyError):  # no user name in some containers
        tags["mlflow.user"] = getpass.getuser()
    import torch  # here, so that scripts/sync.py starts without it

    if torch.cuda.is_available():
        tags["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return hide({key: value for key, value in tags.items() if value})


def git(*words: str) -> str | None:
    """What a git command prints in this project; None where it fails, or there is no git."""
    with suppress(OSError, SubprocessError):
        command = ["git", "-C", str(PROJECT_ROOT), *words]
        return check_output(command, stderr=DEVNULL, text=True, timeout=20).strip()
    return None
