"""What a run's folder says of the run: its configuration, origin and end, and its numbers.

Secrets are hidden before anything is written, so that the folder and its result can be shared.
torch is imported by a run alone, so that the tools that read folders start without it.
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
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, SubprocessError, check_output
from typing import Any

import yaml
from omegaconf import OmegaConf

from src.utils.environment import PROJECT_ROOT
from src.utils.errors import UserError
from src.utils.files import METRICS, RECORD, write_text

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "torchao", "datasets")
MAX_DIFF = 1_000_000  # characters of uncommitted changes that are kept
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.I)
SECRET_SHAPES = re.compile(
    r"\bhf_\w{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_\w{20,}|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s@]+(?=@)"
)
# Of RECORD: the thread that sends to MLflow updates it beside the one that trains.
LOCK = threading.Lock()


def start_record(
    folder: Path, written: dict[str, Any], fingerprints: dict[str, str], step: int
) -> None:
    """Write the record of a run that begins; from a step above 0 it continues the earlier one.

    Args:
        folder: the run's.
        written: its config as plain data, for `config.yaml`.
        fingerprints: tags that say which data it has.
        step: where it begins.
    """
    facts: dict[str, Any] = {"key": uuid.uuid4().hex, "started": int(time.time() * 1000)}
    if step and (folder / RECORD).is_file():
        earlier = read_record(folder)
        facts = {name: earlier[name] for name in facts}
        if 0 < earlier.get("final_step", 0) <= step:  # else that step is taken again
            facts["final_step"] = earlier["final_step"]
    tags = provenance() | fingerprints
    if "mlflow.source.git.commit" not in tags and (PROJECT_ROOT / ".git").exists():
        print(f"warning: {RECORD} has no commit, because git fails here: see `git status`")
    write_text(folder / "config.yaml", OmegaConf.to_yaml(hide(written)))
    _write(folder, facts | {"status": "RUNNING", "tags": tags})
    changes, diff = git("diff", "HEAD"), folder / "uncommitted.diff"
    if changes:
        write_text(diff, hide(changes[:MAX_DIFF]))
    elif changes is not None and step == 0:  # of another run; None: git fails
        diff.unlink(missing_ok=True)


def read_record(folder: Path) -> dict[str, Any]:
    """The facts of a run.

    Returns:
        key (identifies the run), started (ms since 1970), status (RUNNING, FINISHED, FAILED or
        KILLED), tags (see `provenance`; and the fingerprints of the data), and what is known
        later: ended, final, final_step, mlflow and mlflow_experiment (ids).

    Raises:
        UserError: the file is damaged.
    """
    try:
        facts = dict(json.loads((folder / RECORD).read_text("utf-8")))
        facts["key"], facts["started"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / RECORD}: is damaged: {error}") from None
    return facts


def update_record(folder: Path, **facts: Any) -> None:
    """Add or change facts of a run."""
    with LOCK:
        _write(folder, read_record(folder) | facts)


def _write(folder: Path, facts: dict[str, Any]) -> None:
    write_text(folder / RECORD, json.dumps(facts, indent=1) + "\n")


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
    # The template's version. The file may be missing, in conflict or without this answer.
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        answers = yaml.safe_load((PROJECT_ROOT / ".copier-answers.yml").read_text("utf-8"))
        tags["template"] = str(answers["_commit"])
    with suppress(OSError, KeyError):  # no user name in some containers
        tags["mlflow.user"] = getpass.getuser()
    import torch

    if torch.cuda.is_available():
        tags["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return hide({key: value for key, value in tags.items() if value})


def git(*words: str) -> str | None:
    """What a git command prints in this project; None where it fails, or there is no git."""
    with suppress(OSError, SubprocessError):
        command = ["git", "-C", str(PROJECT_ROOT), *words]
        return check_output(command, stderr=DEVNULL, errors="replace", timeout=20).strip()
    return None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines that are whole and have a step."""
    lines = []
    # Not splitlines(): an answer may have a separator that ends a line for Python, not for JSON.
    for line in path.read_text("utf-8").split("\n") if path.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            read = json.loads(line)
            if isinstance(read["step"], int):
                lines.append(read)
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run takes those steps again."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    if path.exists():
        write_text(path, text)


def draw_curves(folders: Sequence[Path], picture: Path) -> None:
    """Draw the training and evaluation loss of one run or several over their steps."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    canvas = Figure(figsize=(8, 4.5), layout="constrained")
    axes = canvas.subplots()
    for number, folder in enumerate(folders):
        rows = read_metrics(folder / METRICS)
        for key, style in (("loss", "-"), ("eval_loss", "o--")):
            drawn = [(row["step"], row[key]) for row in rows if key in row]  # null leaves a gap
            if drawn:
                label = f"{folder.name}: {key}"
                axes.plot(*zip(*drawn, strict=True), style, label=label, color=f"C{number}")
    axes.set(xlabel="optimizer step", ylabel="loss per labelled token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    canvas.savefig(picture, dpi=120, format="png")
