"""An environment that the developer's own settings do not reach, and renders to read."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import releases
from helpers import render

collect_ignore = ["in_project"]  # see test_in_project.py
# Files that take minutes. Started last, one of them would run alone while the other worker waits.
LONG = (
    "test_generated_project.py",
    "test_in_project.py",
    "test_update.py",
    "test_mutations.py",
    "test_releases.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take minutes first."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the settings of copier, uv, git and the hub from every test."""
    settings = tmp_path_factory.mktemp("settings") / "settings.yml"
    settings.write_text("{}")
    empty = settings.with_name("empty")
    empty.touch()
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name == "VIRTUAL_ENV" or (name.startswith("UV_") and name != "UV_CACHE_DIR"):
                patch.delenv(name)
        patch.setenv("COPIER_SETTINGS_PATH", str(settings))
        patch.setenv("UV_NO_CONFIG", "1")
        patch.setenv("UV_PYTHON", sys.executable)
        patch.setenv("GIT_CONFIG_GLOBAL", str(empty))
        for role in ("AUTHOR", "COMMITTER"):
            patch.setenv(f"GIT_{role}_NAME", "Ada")
            patch.setenv(f"GIT_{role}_EMAIL", "ada@example.org")
        patch.setenv("HF_HUB_OFFLINE", "1")
        # Where Python keeps no bytecode, each of the many processes would compile torch anew: keep
        # it for the session, where no project sees it.
        if os.environ.get("PYTHONDONTWRITEBYTECODE"):
            patch.delenv("PYTHONDONTWRITEBYTECODE")
            patch.setenv("PYTHONPYCACHEPREFIX", str(settings.with_name("bytecode")))
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project rendered from the default answers. Tests read it and leave it as it is."""
    return render(tmp_path_factory.mktemp("default") / "project")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template's repository: history, an earlier release, and the working tree as the later."""
    return releases.template(tmp_path_factory.mktemp("template") / "template")


@pytest.fixture(scope="session")
def earlier(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of the earlier release. Tests copy it and leave it as it is."""
    project = tmp_path_factory.mktemp("earlier") / "project"
    return releases.copy(template, project, "--vcs-ref", releases.EARLIER)


@pytest.fixture(scope="session")
def later(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of the later release, which nobody touched."""
    return releases.copy(template, tmp_path_factory.mktemp("later") / "project")
