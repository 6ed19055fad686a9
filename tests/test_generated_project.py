"""A rendered project, installed and used as its owner would: it passes its own checks, and answers."""

import json
import re
import shlex
from pathlib import Path

import pytest

from helpers import SETTINGS, offline, render, run


def commands() -> list[str]:
    """Return the commands that copier prints after a copy, but for the `cd`."""
    blocks = re.findall(r"(?:^    .+\n)+", SETTINGS["_message_after_copy"], re.MULTILINE)
    return [line.strip() for line in blocks[0].splitlines()][1:]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A default project, committed and installed as the message after a copy says."""
    folder = render(tmp_path_factory.mktemp("installed") / "my-finetune")
    first = [command for command in commands() if not command.startswith("uv run ")]
    assert any("git commit" in command for command in first)
    assert "uv sync --locked" in first
    run("bash", "-euc", "\n".join(first), cwd=folder)
    return folder


@pytest.fixture(scope="session")
def tested(installed: Path) -> Path:
    """The same project, after its own tests have passed."""
    # The slow ones too; in one process, as this suite has two.
    words = ("pytest", "-q", "-n", "0", "-m", "not gpu")
    run(*offline(), "uv", "run", "--no-sync", *words, cwd=installed)
    return installed


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "ty check"])
def test_a_fresh_project_passes_its_own_checks(command: str, installed: Path) -> None:
    run(*offline(), "uv", "run", "--no-sync", *command.split(), cwd=installed)


def test_a_fresh_project_passes_its_own_tests_offline(tested: Path) -> None:
    assert tested.exists()


def test_running_the_tests_leaves_nothing_to_commit(tested: Path) -> None:
    assert run("git", "status", "--porcelain", cwd=tested).stdout == ""


def test_the_package_is_importable_from_anywhere(installed: Path, tmp_path: Path) -> None:
    python = installed / ".venv/bin/python"
    found = run(python, "-c", "import src.data; print(src.__file__)", cwd=tmp_path).stdout.strip()
    assert Path(found) == installed / "src/__init__.py"


def test_the_message_after_a_copy_ends_with_the_right_answer(installed: Path) -> None:
    *_, train, ask = commands()
    question = shlex.split(ask)[-1]
    rows = [json.loads(line) for line in (installed / "data/sample.jsonl").open()]
    chats = [row["messages"] for row in rows if "messages" in row]
    answers = [chat[-1]["content"] for chat in chats if chat[0]["content"] == question]
    output = run("bash", "-euc", f"{train}\n{ask}", cwd=installed).stdout
    assert output.splitlines()[-1] in answers
