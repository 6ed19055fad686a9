"""The two locks: complete, equal where they overlap, and free of anybody's settings."""

import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from helpers import ROOT, TEMPLATE, run

TEMPLATE_LOCK = TEMPLATE / "uv.lock.jinja"
RESERVED = set((ROOT / "includes/reserved_names.txt").read_text().split())


def toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def pinned(path: Path) -> dict[str, set[str]]:
    """Map each package of a lock, but the project itself, to the versions that it pins."""
    found: dict[str, set[str]] = {}
    for package in toml(path)["package"]:
        if "registry" in package["source"]:
            found.setdefault(package["name"], set()).add(package["version"])
    return found


def test_both_locks_pin_the_same_versions() -> None:
    template, root = pinned(TEMPLATE_LOCK), pinned(ROOT / "uv.lock")
    assert {name: root.get(name) for name in template} == template


def test_the_root_lock_answers_to_its_pyproject(tmp_path: Path) -> None:
    run("uv", "lock", "--check", "--offline", "--cache-dir", tmp_path, cwd=ROOT)


def test_the_root_asks_for_what_the_rendered_project_asks_for(project: Path) -> None:
    rendered, root = toml(project / "pyproject.toml"), toml(ROOT / "pyproject.toml")
    assert root["dependency-groups"]["stack"] == rendered["project"]["dependencies"]
    own = [line for line in root["dependency-groups"]["dev"] if isinstance(line, str)]
    assert set(rendered["dependency-groups"]["dev"]) <= set(own)


def test_only_the_projects_name_is_templated_in_the_lock() -> None:
    text = TEMPLATE_LOCK.read_text()
    assert text.count('\nname = "{{ project_name }}"\n') == 1
    assert [text.count(mark) for mark in ("{{", "}}", "{%", "{#")] == [1, 1, 0, 0]


def test_the_locks_come_from_one_public_index_without_personal_settings() -> None:
    for path in (TEMPLATE_LOCK, ROOT / "uv.lock"):
        lock = toml(path)
        sources = [package["source"] for package in lock["package"]]
        assert len({source["registry"] for source in sources if "registry" in source}) == 1
        assert "options" not in lock


def test_every_package_of_the_lock_is_a_name_that_a_project_may_not_have() -> None:
    assert pinned(TEMPLATE_LOCK).keys() <= RESERVED


def test_every_module_of_python_is_a_name_that_a_project_may_not_have() -> None:
    modules = {name.replace("_", "-") for name in sys.stdlib_module_names if name[0] != "_"}
    assert modules <= RESERVED


def test_everything_that_the_code_imports_is_a_dependency(project: Path) -> None:
    imported = {"dotenv": "python-dotenv", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    imported["pynvml"] = "nvidia-ml-py"
    requirements = toml(project / "pyproject.toml")["project"]["dependencies"]
    declared = {Requirement(line).name for line in requirements}
    sources = [*(project / "src").rglob("*.py"), *(project / "scripts").rglob("*.py")]
    lines = [line.split() for path in sources for line in path.read_text().splitlines()]
    names = {words[1].split(".")[0] for words in lines if words[:1] in (["import"], ["from"])}
    third_party = {name.rstrip(",") for name in names} - set(sys.stdlib_module_names) - {"src"}
    assert {imported.get(name, name) for name in third_party} <= declared


def test_uv_adds_below_the_fence_of_the_dependencies(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "project")
    run("uv", "add", "--frozen", "aaa", "zzz>=1", cwd=tmp_path / "project")
    text = (tmp_path / "project/pyproject.toml").read_text()
    template, own = text.split("# Yours go below this line")
    before = (project / "pyproject.toml").read_text().split("# Yours go below this line")[0]
    assert template == before
    assert '"aaa",' in own
    assert '"zzz>=1",' in own
