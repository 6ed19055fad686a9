"""The rules that hold for the code under template/ hold in the rendered project, and the reverse."""

import tomllib

import pytest

from helpers import ROOT, run


def test_both_projects_lint_by_the_same_rules(project) -> None:
    own = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    rendered = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["ruff"]
    assert (own["lint"], own["line-length"]) == (rendered["lint"], rendered["line-length"])


@pytest.mark.parametrize("command", ["ruff check", "ruff format --check", "ty check"])
def test_this_repository_passes_its_own_checks(command) -> None:
    run("uv", "run", "--no-sync", *command.split(), cwd=ROOT)
