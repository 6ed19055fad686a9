"""An environment that the developer's own settings do not reach, and one default render."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import render


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
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project rendered from the default answers. Tests read it and leave it as it is."""
    return render(tmp_path_factory.mktemp("default") / "project")
