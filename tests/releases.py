"""Releases of the template to update between, and a project that its owner has lived in."""

import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import wheelhouse
from helpers import ROOT, offline, run, snapshot

COPIER = Path(sys.executable).with_name("copier")
EARLIER, LATER = "9998.0", "9999.0"
# What an owner finds in the updated project: as the working tree has it, and as the release before
# it had it. The earlier one also lacked NEW_FILE and pinned OLD_PIN.
CHANGES = {
    "template/pyproject.toml.jinja": [
        ('    "torch>=2.11",\n', '    "torch>=2.10",\n'),
        ('    "pyyaml>=6.0.2",\n', ""),
    ],
    "template/uv.lock.jinja": [
        ('name = "torch", specifier = ">=2.11"', 'name = "torch", specifier = ">=2.10"'),
        ('    { name = "pyyaml", specifier = ">=6.0.2" },\n', ""),
    ],
    "template/configs/train.yaml.jinja": [("  log_every: 10\n", "  log_every: 25\n")],
    "template/src/data/dataset.py": [('"""', '"""Rows become tokens. ')],
    "template/tests/test_gpu.py": [('"""', '"""On a GPU. ')],
    "template/src/utils/seed.py": [("\n\n\ndef ", "\n\nOLD = True\n\n\ndef ")],
}
NEW_FILE = "tests/test_rows.py"
OLD_PIN = ("tqdm", "4.67.0")


def template(folder: Path) -> Path:
    """Commit the working tree as the newest release, on top of history and of one made up before it."""
    run("git", "clone", "-q", "--no-checkout", ROOT, folder, cwd=ROOT)
    shutil.copytree(snapshot().name, folder, dirs_exist_ok=True, ignore=_git)
    for path, changes in CHANGES.items():
        text = (folder / path).read_text()
        for now, earlier in changes:
            assert now in text, f"{path}: nothing to change back: {now!r}"
            text = text.replace(now, earlier, 1)
        (folder / path).write_text(text)
    lock = folder / "template/uv.lock.jinja"
    lock.write_text(_with_old_pin(lock.read_text()))
    (folder / "template" / NEW_FILE).unlink()
    release(folder, EARLIER)
    shutil.copytree(snapshot().name, folder, dirs_exist_ok=True, ignore=_git)
    release(folder, LATER)
    return folder


def _git(folder: str, names: list[str]) -> list[str]:
    return [".git"] if ".git" in names else []


def _with_old_pin(lock: str) -> str:
    """Return a lock that has one older package, and less to ask for."""
    head, *blocks = lock.split("[[package]]\n")
    name, version = OLD_PIN
    for index, block in enumerate(blocks):
        if block.startswith(f'name = "{name}"'):
            blocks[index] = block.replace(block.split('"')[3], version)
        elif block.startswith('name = "{{'):
            blocks[index] = block.replace('    { name = "pyyaml" },\n', "")
    return "[[package]]\n".join([head, *blocks])


def release(folder: Path, tag: str) -> None:
    """Commit everything in a template's repository, and tag it."""
    run("git", "add", "-A", cwd=folder)
    run("git", "commit", "-q", "-m", tag, cwd=folder)
    run("git", "tag", tag, cwd=folder)


def copy(source: Path, project: Path, *options: str) -> Path:
    """Render a release as a user does, and commit it to a repository of its own."""
    run(*offline(), COPIER, "copy", "-q", "--defaults", *options, source, project, cwd=source)
    run("git", "init", "-q", "-b", "main", cwd=project)
    commit(project, "Render template")
    return project


def commit(project: Path, message: str) -> None:
    """Commit all that git does not ignore."""
    run("git", "add", "-A", ".", cwd=project)
    run("git", "commit", "-q", "-m", message, cwd=project)


def update(project: Path, *options: str, code: int = 0) -> CompletedProcess[str]:
    """Update as a user does: with `copier update --defaults`, on a machine without a network."""
    command = (*offline(), COPIER, "update", "--defaults", *options)
    return run(*command, cwd=project, code=code)


def resolver(lock: Path, folder: Path) -> tuple[str, ...]:
    """Return the words of a command: uv that finds what a lock pins, and a few more, offline."""
    settings = wheelhouse.build(lock, folder)
    for name, version in (("owners-metrics", "1.0"), ("another", "2.0"), OLD_PIN):
        wheelhouse.add(folder, name, version)
    return ("env", *(f"{name}={value}" for name, value in settings.items()), "uv")


def recorded() -> list[str]:
    """Return the tags and commits that projects may have been rendered from, oldest first."""
    lines = (ROOT / "tests/releases.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def is_known(release: str, repository: Path) -> bool:
    """Say whether a repository has a release; a shallow clone has not."""
    command = ("git", "cat-file", "-e", f"{release}^{{commit}}")
    return subprocess.run(command, cwd=repository, check=False).returncode == 0
