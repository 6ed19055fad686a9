"""Render the working tree's template, and run commands in what comes out."""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml
from copier import run_copy

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "template"
SETTINGS = yaml.safe_load((ROOT / "copier.yml").read_text())
QUESTIONS = {name: question for name, question in SETTINGS.items() if not name.startswith("_")}


def choices(question: str) -> list[str]:
    """Return the values that a choice question allows."""
    allowed = QUESTIONS[question]["choices"]
    return list(allowed.values() if isinstance(allowed, dict) else allowed)


@cache
def snapshot() -> tempfile.TemporaryDirectory:
    """Commit the working tree, changes and new files included, to a repository of its own.

    Whoever edits a file while the tests run does not change what they see.
    """
    folder = tempfile.TemporaryDirectory(prefix="template-")
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (Path(folder.name) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder.name) / name)
    run("git", "init", "-q", "-b", "main", cwd=Path(folder.name))
    run("git", "add", "-A", cwd=Path(folder.name))
    run("git", "commit", "-q", "-m", "Snapshot", cwd=Path(folder.name))
    return folder


def render(folder: Path, **answers: str) -> Path:
    """Render the working tree's template into a folder, as `copier copy --defaults` does."""
    # copier accepts answers to questions that nobody asks; a test that misspells one proves nothing.
    assert answers.keys() <= QUESTIONS.keys(), (
        f"not a question: {answers.keys() - QUESTIONS.keys()}"
    )
    run_copy(snapshot().name, folder, data=answers, defaults=True, quiet=True)
    return folder


def copy(folder: Path, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Render as a user does: with `copier copy --defaults`, on a machine without a network."""
    command = (Path(sys.executable).with_name("copier"), "copy", "--defaults", *options)
    return run(*offline(), *command, snapshot().name, folder, cwd=folder.parent, code=code)


def run(
    *command: str | Path, cwd: Path, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, check its exit code, and show its output when the code is another."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    shown = " ".join(str(word) for word in command)
    assert done.returncode == code, f"{shown}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def script(folder: Path, name: str, *arguments: str) -> str:
    """Run a script of a rendered project in this repository's environment; return its output."""
    command = (sys.executable, f"scripts/{name}.py", *arguments)
    return run(*command, cwd=folder, PYTHONPATH=str(folder)).stdout


@cache
def offline() -> tuple[str, ...]:
    """Return the words before a command that leave it no network but the machine's own loopback.

    Where the system has no namespaces of its own, proxies that nobody answers must do.
    """
    loopback = 'ip link set lo up && exec "$@"'
    words = ("unshare", "--map-root-user", "--net", "sh", "-c", loopback, "offline")
    able = shutil.which("unshare") and not subprocess.run([*words, "true"], check=False).returncode
    proxies = (f"{scheme}_proxy=http://127.0.0.1:9" for scheme in ("http", "https"))
    return words if able else ("env", *proxies)


def files(folder: Path) -> dict[str, bytes]:
    """Map the path of every file under a folder to its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def imported(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the project's files that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = folder / name.replace(".", "/")
            yield from filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py"))


def reachable(folder: Path, *starts: str) -> set[str]:
    """Return the paths of all of the project's files that some of them import, step by step."""
    found: set[Path] = set()
    waiting = [folder / start for start in starts]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += imported(file, folder)
    return {path.relative_to(folder).as_posix() for path in found}
