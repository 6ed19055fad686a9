"""Where a project may come from, how it follows its template, and what copier tells its owner."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

import releases
from helpers import ROOT, files, offline, run, snapshot
from releases import COPIER, EARLIER, LATER, commit, update


def rendered(project: Path) -> dict[str, bytes]:
    """Map every file of a project but git's own, and but the line that names the template."""
    found = {path: data for path, data in files(project).items() if not path.startswith(".git/")}
    answers = found[".copier-answers.yml"].splitlines()
    found[".copier-answers.yml"] = b"\n".join(a for a in answers if not a.startswith(b"_src_path"))
    return found


def recorded(project: Path) -> dict[str, str]:
    return yaml.safe_load((project / ".copier-answers.yml").read_text())


@pytest.mark.parametrize("release", [*releases.recorded(), EARLIER])
def test_an_untouched_project_updates_to_a_fresh_render(
    release: str, template: Path, later: Path, tmp_path: Path
) -> None:
    if not releases.is_known(release, template):
        pytest.skip(f"{release} is not in this clone: git fetch --tags --unshallow")
    project = releases.copy(template, tmp_path / "project", "--vcs-ref", release)
    run("git", "rm", "-q", "uv.lock", cwd=project)  # the cure that takes the template's own lock
    commit(project, "Take the template's lock")
    update(project)
    assert rendered(project) == rendered(later)


def test_a_project_of_a_tag_records_it_and_follows_the_tags(
    template: Path, earlier: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(earlier, tmp_path / "project")
    assert recorded(project)["_commit"] == EARLIER
    update(project)
    assert recorded(project)["_commit"] == LATER


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of the working tree's template that has no tags."""
    return shutil.copytree(snapshot().name, tmp_path / "clone")


def fix(clone: Path, text: str) -> None:
    """Make a change in a clone that every project should get."""
    with (clone / "template/.env.example").open("a") as file:
        file.write(f"# {text}\n")


def has_fix(project: Path, text: str) -> bool:
    return f"# {text}\n" in (project / ".env.example").read_text()


def test_a_project_of_the_readmes_command_follows_the_clone(clone: Path, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"copier (copy --defaults \"\$PWD\" \S+)", readme)
    assert found
    # The README's own words, but for how it comes by copier.
    run(*offline(), "bash", "-euc", f"{COPIER} {found[1]}", cwd=clone)
    project = tmp_path / "my-finetune"
    run("git", "init", "-q", "-b", "main", cwd=project)
    commit(project, "Render template")
    fix(clone, "first")
    commit(clone, "Move on")
    update(project)
    assert has_fix(project, "first")
    commit(project, "Update")
    fix(clone, "second")
    releases.release(clone, "0.1.0")
    update(project)
    assert has_fix(project, "second")
    assert recorded(project)["_commit"] == "0.1.0"


def test_a_dirty_clone_renders_and_updates_what_is_in_its_folder(
    clone: Path, tmp_path: Path
) -> None:
    project = releases.copy(clone, tmp_path / "project")
    fix(clone, "not committed")
    (clone / "template/new.txt").touch()
    fresh = releases.copy(clone, tmp_path / "fresh")
    update(project)
    for each in (fresh, project):
        assert has_fix(each, "not committed")
        assert (each / "new.txt").exists()


def test_a_project_of_a_dirty_clone_updates_once_it_names_a_commit(
    clone: Path, tmp_path: Path
) -> None:
    fix(clone, "first")
    project = releases.copy(clone, tmp_path / "project")
    commit(clone, "Move on")
    fix(clone, "second")
    commit(clone, "Move on again")
    # copier commits what is dirty in a clone of its own, which is gone when it ends.
    assert "Unknown revision" in update(project, code=1).stderr
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    cure = re.search(r"^sed .*_commit.*$", contributing, re.MULTILINE)
    assert cure
    run(
        "bash",
        "-euc",
        cure[0].replace("TEMPLATE", str(clone)).replace("HEAD", "HEAD~"),
        cwd=project,
    )
    commit(project, "Name a commit")
    update(project)
    assert has_fix(project, "second")


def commands(message: str) -> list[list[str]]:
    """Return the blocks of commands of a message."""
    blocks = re.findall(r"(?:^    .+\n)+", message, re.MULTILINE)
    return [[line.strip() for line in block.splitlines()] for block in blocks]


def test_every_command_of_the_message_after_an_update_works(clone: Path, tmp_path: Path) -> None:
    project = releases.copy(clone, tmp_path / "project")
    for folder, words in ((project, "Mine."), (clone / "template", "Theirs.")):
        path = folder / "src/utils/seed.py"
        path.write_text(f'"""{words}"""\n' + path.read_text().split("\n", 1)[1])
    commit(project, "Live in it")
    commit(clone, "Move on")
    # uvx would fetch copier; and of the project's tests, those that notice conflicts are enough.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uvx").write_text(f'#!/bin/sh\nshift\nexec "{COPIER}" "$@"\n')
    (tools / "uvx").chmod(0o755)

    def shell(*lines: str, code: int = 0) -> str:
        script = "\n".join(("set -eu", f'PATH="{tools}:$PATH"', *lines))
        only = {"PYTEST_ADDOPTS": "tests/test_project.py"}
        return run("bash", "-c", script, cwd=project, code=code, **only).stdout

    (conflicts,), finish, take = commands(update(project).stderr)
    assert shell(conflicts) == "src/utils/seed.py\n"
    assert "src/utils/seed.py" in shell(*finish, code=1)
    run("git", "checkout", "--theirs", "src/utils/seed.py", cwd=project)
    shell(*finish)
    shell(*take)
    assert "Theirs." in (project / "src/utils/seed.py").read_text()
    assert run("git", "status", "--porcelain", cwd=project).stdout == ""
