"""Is the project one whose runs can be found again: tracked, pinned, tested, committed, no leak."""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

from src.config import Config
from src.doctor import Finding
from src.training.provenance import template_version
from src.training.record import RECORD, Record
from src.utils.environment import from_root, to_root
from src.utils.git import git

COMMIT = "git add {0} && git commit -m 'Keep {0}'"
WORKFLOWS = (".github/workflows/*.y*ml", ".gitlab-ci.yml", ".circleci/config.yml", "Jenkinsfile")
MARKERS = r"^(<<<<<<<|>>>>>>>|\|\|\|\|\|\|\|) "  # also what `copier update` leaves


def check_project(config: Config, root: Path) -> Iterator[Finding]:
    """Look at the project's files and its git history."""
    yield from _tracking(config)
    yield from _unsent(from_root(config.output_dir).parent)
    yield from _python(root)
    yield from _workflow(root)
    yield from _template(root)
    if git(root, "rev-parse", "HEAD") is None:
        begin = "git init && git add -A && git commit -m 'Begin'"
        yield Finding("WARN", "no commit here: no run will know its code", begin)
        return
    yield from _secrets(root)
    yield from _conflicts(root)
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


def _python(root: Path) -> Iterator[Finding]:
    pin, runs = root / ".python-version", ".".join(map(str, sys.version_info[:2]))
    pinned = pin.read_text().strip() if pin.is_file() else None
    if pinned is None:
        yield Finding("WARN", "Python is not pinned: no .python-version", f"uv python pin {runs}")
    elif not f"{pinned}.".startswith(f"{runs}."):
        mend = "uv sync --locked, then uv run scripts/…"
        yield Finding("WARN", f"Python {runs} runs, and {pinned} is pinned", mend)
    else:
        yield Finding("OK", f"Python {pinned} is pinned")


def _workflow(root: Path) -> Iterator[Finding]:
    files = [path for pattern in WORKFLOWS for path in root.glob(pattern)]
    if tests := [path for path in files if "pytest" in path.read_text("utf-8")]:
        yield Finding("OK", f"{tests[0].relative_to(root)} runs the tests")
    else:
        mend = "uvx copier update, and answer github or gitlab"
        yield Finding("WARN", "no CI runs the tests", mend)


def _template(root: Path) -> Iterator[Finding]:
    if version := template_version(root):
        yield Finding("OK", f"rendered by version {version} of the template")
    else:
        text = ".copier-answers.yml is not whole: no update of the template arrives"
        yield Finding("WARN", text, "git checkout -- .copier-answers.yml")


def _committed(root: Path) -> Iterator[Finding]:
    if not (root / "uv.lock").is_file():
        yield Finding("FAIL", "uv.lock is missing", "git checkout -- uv.lock, or uv lock")
    elif git(root, "diff", "--name-only", "HEAD", "--", "uv.lock"):  # uv writes a missing one anew
        mend = "git checkout -- uv.lock && uv sync --locked; or commit it, if you wanted it"
        yield Finding("WARN", "uv.lock is not the one that is committed", mend)
    for name in filter(lambda name: (root / name).is_file(), ("uv.lock", ".python-version")):
        if git(root, "ls-files", name):
            yield Finding("OK", f"{name} is in git")
        else:
            yield Finding("FAIL", f"{name} is not in git", COMMIT.format(name))
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


def _conflicts(root: Path) -> Iterator[Finding]:
    found = git(root, "grep", "--untracked", "-nIE", MARKERS) or ""
    rejected = git(root, "ls-files", "--others", "--exclude-standard", "*.rej") or ""
    places: dict[str, str] = {}  # the first of each file
    for name, line, *_ in (line.split(":") for line in found.splitlines()):
        places.setdefault(name, f"{name}:{line}")
    files = [*places.values(), *rejected.splitlines()]
    for place in files[:3]:
        mend = "edit the file: keep one side, or both, and remove the markers"
        yield Finding("FAIL", f"{place}: a conflict that nobody has resolved", mend)
    if not files:
        yield Finding("OK", "no conflict markers")
