"""The core needs no tool, and no tool needs another: whoever deletes one keeps a working project."""

import shutil
import sys
from pathlib import Path

import pytest

from helpers import TEMPLATE, imported, reachable, run

CORE = ("scripts/train.py", "scripts/inference.py")
TOOLS = ("compare", "doctor", "evaluate", "export", "look", "plan", "sync")


def files_of(tool: str) -> list[str]:
    """Return what is deleted with a tool: its script, its file in src/tools and its test file."""
    paths = (f"scripts/{tool}.py", f"src/tools/{tool}.py", f"tests/test_{tool}.py")
    return [path for path in paths if (TEMPLATE / path).is_file()]


def test_what_trains_and_answers_imports_no_tool() -> None:
    core = reachable(TEMPLATE, *CORE)
    assert "src/training/trainer.py" in core
    assert not [path for path in core if path.startswith("src/tools/")]


def test_every_file_in_tools_belongs_to_a_script_that_is_a_tool() -> None:
    scripts = {path.stem for path in (TEMPLATE / "scripts").glob("*.py")}
    assert scripts == {*TOOLS, *(Path(path).stem for path in CORE)}
    assert {path.stem for path in (TEMPLATE / "src/tools").glob("*.py")} <= {*TOOLS, "__init__"}


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_imports_a_tool_but_its_own_files(tool: str) -> None:
    own = files_of(tool)
    targets = {TEMPLATE / path for path in own if not path.startswith("tests/")}
    users = [
        path
        for file in TEMPLATE.rglob("*.py")
        if (path := file.relative_to(TEMPLATE).as_posix()) not in own
        if targets & {*imported(file, TEMPLATE)}
    ]
    assert users == []


@pytest.mark.parametrize("tool", TOOLS)
def test_a_project_without_a_tool_passes_its_lint(project: Path, tmp_path: Path, tool: str) -> None:
    delete(project, tmp_path, tool)
    # Ruff takes an import of a file that is absent for another package's, in the wrong place.
    run(command("ruff"), "check", cwd=tmp_path)


def test_a_project_without_any_tool_passes_its_lint_and_types(
    project: Path, tmp_path: Path
) -> None:
    delete(project, tmp_path, *TOOLS)
    assert not list((tmp_path / "src/tools").glob("[!_]*.py"))
    run(command("ruff"), "check", cwd=tmp_path)
    run(command("ty"), "check", "--python", sys.prefix, cwd=tmp_path)


def delete(project: Path, folder: Path, *tools: str) -> None:
    """Copy a rendered project into a folder, without the files of some tools."""
    shutil.copytree(project, folder, dirs_exist_ok=True)
    for path in (path for tool in tools for path in files_of(tool)):
        (folder / path).unlink()


def command(name: str) -> Path:
    """Return the path of a command of this environment."""
    return Path(sys.executable).with_name(name)
