"""Where a run comes from: code, lock, template, machine and command line; never a secret."""

import getpass
import hashlib
import os
import re
import shlex
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml

from src.utils.environment import PROJECT_ROOT
from src.utils.git import git

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "datasets")
MOST = 1_000_000  # characters of uncommitted changes that are kept
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.I)
SECRET_SHAPES = re.compile(
    r"\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{20,}|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s@]+(?=@)"
)


def hide(text: str) -> str:
    """The text without what is secret in this environment, or looks like a token or a login."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return SECRET_SHAPES.sub("***", text)


def provenance() -> dict[str, str]:
    """What is worth knowing of a run in a year, as tags for MLflow."""
    changed = git(PROJECT_ROOT, "status", "--porcelain")
    lock = PROJECT_ROOT / "uv.lock"
    tags = {
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git(PROJECT_ROOT, "rev-parse", "HEAD"),
        "git.dirty": str(bool(changed)).lower() if changed is not None else None,
        "command": shlex.join(["uv", "run", *sys.argv]),
        "python": sys.version.split()[0],
        "template": template_version(PROJECT_ROOT),
        **{name: _version(name) for name in LIBRARIES},
    }
    with suppress(OSError, KeyError):  # no user name in some containers
        tags["mlflow.user"] = getpass.getuser()
    if lock.is_file():
        tags["uv.lock"] = hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    if torch.cuda.is_available():
        tags["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {key: hide(value)[:500] for key, value in tags.items() if value}


def template_version(root: Path) -> str | None:
    """Which version of the template a project was rendered by; None where it does not say."""
    with suppress(OSError, yaml.YAMLError):  # absent, or with the markers of a conflict
        answers = yaml.safe_load((root / ".copier-answers.yml").read_text("utf-8"))
        return str(answers["_commit"]) if answers and "_commit" in answers else None
    return None


def uncommitted() -> str:
    """The changes since the last commit, cut where they are long."""
    return hide((git(PROJECT_ROOT, "diff", "HEAD") or "")[:MOST])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
