"""Will the project's runs be found again: recorded, sent, committed, and without a secret in git.

What `uv sync --locked`, `uv lock --check`, pre-commit and the tests check is not checked again.
"""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from src.config import Config
from src.doctor import Finding
from src.training.record import Record
from src.utils.environment import from_root, to_root
from src.utils.files import RECORD
from src.utils.git import git


def check_project(config: Config, root: Path) -> Iterator[Finding]:
    """Look at the project's files and its git history."""
    yield from _tracking(config)
    yield from _unsent(from_root(config.output_dir).parent)
    if git(root, "rev-parse", "HEAD") is None:
        begin = "git init && git add -A && git commit -m 'Begin'"
        yield Finding("WARN", "no commit here: no run will know its code", begin)
        return
    yield from _secrets(root)
    yield from _committed(root)


def _tracking(config: Config) -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not config.tracking.enabled:
        yield Finding("WARN", "runs are not recorded in MLflow", "tracking.enabled=true")
    elif uri.startswith("http") and not _answers(uri):
        mend = "start it, or unset MLFLOW_TRACKING_URI (.env?); scripts/sync.py sends later"
        yield Finding("WARN", "MLflow's server, MLFLOW_TRACKING_URI, does not answer", mend)
    else:
        where = "at MLFLOW_TRACKING_URI" if uri else "mlflow.db"
        yield Finding("OK", f"runs are recorded in MLflow, {where}: {config.tracking.experiment}")


def _answers(uri: str) -> bool:
    parts = urlsplit(uri)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])  # its health needs no password
    try:
        return urlopen(f"{bare.geturl().rstrip('/')}/health", timeout=3).status == 200
    except (OSError, ValueError):
        return False


def _unsent(outputs: Path) -> Iterator[Finding]:
    """Runs beside this one that have ended, and of which MLflow lacks something."""
    records = [Record(path.parent) for path in sorted(outputs.glob(f"*/{RECORD}"))]
    ended = [record for record in records if record.facts["status"] != "RUNNING"]
    missing = [to_root(record.folder) for record in ended if "sent" not in record.facts]
    if missing:
        text = f"{len(missing)} of {len(ended)} runs that have ended are not in MLflow, or in part"
        yield Finding("WARN", text, shlex.join(["uv", "run", "scripts/sync.py", *missing[:5]]))
    elif ended:
        yield Finding("OK", f"{len(ended)} of {len(ended)} runs that have ended are in MLflow")


def _committed(root: Path) -> Iterator[Finding]:
    if changed := (git(root, "status", "--porcelain") or "").splitlines():
        name = changed[0].split(maxsplit=1)[1]
        files = f"{len(changed)} files are" if len(changed) > 1 else f"{name} is"
        text = f"{files} not committed: a run keeps the difference only"
        yield Finding("WARN", text, "git add -A && git commit")
    else:
        yield Finding("OK", f"all is committed: {git(root, 'rev-parse', '--short', 'HEAD')}")


def _secrets(root: Path) -> Iterator[Finding]:
    if git(root, "check-ignore", "--no-index", ".env") is None:
        yield Finding("FAIL", ".env is not ignored by git", "echo /.env >> .gitignore")
    elif (commit := git(root, "log", "--all", "--format=%h", "-1", "--", ".env")) is None:
        yield Finding("WARN", "git did not say whether .env was ever committed")
    elif git(root, "ls-files", ".env"):
        mend = "revoke its tokens, which history keeps; then git rm --cached .env && git commit"
        yield Finding("FAIL", ".env is in git", mend)
    elif commit:
        mend = "its tokens stay in history: revoke them"
        yield Finding("WARN", ".env was committed once: git log --all -- .env", mend)
    else:
        yield Finding("OK", ".env is ignored, and was never committed")
