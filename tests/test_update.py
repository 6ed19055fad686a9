"""`copier update` of a project that has been lived in: nothing is lost, and the fixes arrive."""

import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import releases
from helpers import files, run
from releases import NEW_FILE, OLD_PIN, commit, update

# Bytes that a program which reads them as text, or lets git convert them, does not give back.
ADDED = {
    "src/data/mine.py": b"OWN = True\n",
    "notes/déjà vu.txt": "à lire".encode("latin-1"),
    "data/mine.csv": b"prompt,completion\r\nhi,ho\r\n",
    "data/blob.bin": bytes(range(256)) * 16,
    "data/empty.jsonl": b"",
    "configs/mine.yaml": b"output_dir: outputs/mine",
}
IGNORED = {
    ".env": b"HF_TOKEN=hf_secret\r\n",
    "outputs/train/final/adapter_model.safetensors": bytes(range(256)) * 4096,
    "outputs/train/metrics.jsonl": b'{"step": 1}\n',
    "mlruns/1/meta.yaml": b"run: 1\n",
    "mlflow.db": b"SQLite format 3\x00",
    "data/cache/rows.bin": b"\x00\x01",
}
DELETED = [".pre-commit-config.yaml", "tests/test_gpu.py"]  # the template has changed the second
DEPENDENCIES = '    "owners-metrics>=1.0",\n'


Edit = Callable[[bytes], bytes]
Uv = tuple[str, ...]


@dataclass
class Home:
    """Where an owner lives: the project, its repository, and what was there before the update."""

    project: Path
    repository: Path
    before: dict[str, bytes]
    output: CompletedProcess[str] | None = None


@pytest.fixture(scope="session")
def uv(later: Path, tmp_path_factory: pytest.TempPathFactory) -> Uv:
    """The words before a command of uv that let it resolve without a network."""
    return releases.resolver(later / "uv.lock", tmp_path_factory.mktemp("uv") / "wheels")


def write(folder: Path, content: dict[str, bytes]) -> None:
    for path, data in content.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def rewrite(data: bytes) -> bytes:
    """Write src/data/dataset.py anew, but for the first lines."""
    return b"".join(data.splitlines(keepends=True)[:8]) + b"\n\ndef mine() -> None:\n    ...\n"


def edit(data: bytes) -> bytes:
    """Edit configs/train.yaml: a rank, a rate, a comment, no newline at the end."""
    data = data.replace(b"r: 16", b"r: 64  # mine").replace(b"2.0e-4", b"1.0e-4")
    return data.rstrip(b"\n")


def change(path: Path, how: Edit) -> None:
    before = path.read_bytes()
    path.write_bytes(how(before))
    assert path.read_bytes() != before


def live_in(project: Path, uv: Uv) -> None:
    """Do in a project what its owner does in two years."""
    run(*uv, "add", "--no-sync", "owners-metrics", cwd=project)
    run(*uv, "add", "--no-sync", "--group", "notebooks", "another", cwd=project)
    change(project / "configs/train.yaml", edit)
    change(project / "src/data/dataset.py", rewrite)
    write(project, ADDED | IGNORED)
    (project / "run.sh").write_text("#!/bin/sh\n")
    (project / "run.sh").chmod(0o755)
    (project / "data/latest").symlink_to("mine.csv")
    for path in DELETED:
        (project / path).unlink()


@pytest.fixture(scope="session", params=["its own repository", "a monorepo"])
def home(
    request: pytest.FixtureRequest,
    earlier: Path,
    template: Path,
    uv: Uv,
    tmp_path_factory: pytest.TempPathFactory,
) -> Home:
    """A project that was lived in, then updated from the earlier to the later release."""
    repository = tmp_path_factory.mktemp("home") / "repository"
    if request.param == "a monorepo":
        project = repository / "team a/fine tuning"
        shutil.copytree(earlier, project, ignore=shutil.ignore_patterns(".git"))
        write(repository, {"team b/data/x.py": b"X = 1\n", ".gitignore": b"*.log\n"})
        run("git", "init", "-q", "-b", "main", cwd=repository)
        commit(repository, "Render template")
    else:
        project = shutil.copytree(earlier, repository)
    live_in(project, uv)
    commit(repository, "Live in it")
    if request.param == "a monorepo":
        write(repository, {"team b/data/x.py": b"X = 2\n", "team b/new.py": b"", "a.log": b"1"})
    before = everything(repository)
    return Home(project, repository, before, update(project))


def everything(repository: Path) -> dict[str, bytes]:
    return {path: data for path, data in files(repository).items() if not path.startswith(".git/")}


def check_tests(project: Path, *tests: str, code: int = 0) -> CompletedProcess[str]:
    """Run tests of a project with this repository's packages, which are those of its lock."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    return run(*command, cwd=project, code=code, PYTHONPATH=str(project))


def versions(lock: Path) -> dict[str, str]:
    packages = tomllib.loads(lock.read_text())["package"]
    return {package["name"]: package["version"] for package in packages}


@pytest.mark.parametrize("path", [*ADDED, *IGNORED])
def test_what_the_owner_made_is_there_to_the_byte(home: Home, path: str) -> None:
    assert (home.project / path).read_bytes() == (ADDED | IGNORED)[path]


def test_an_added_file_keeps_its_mode_and_a_link_its_target(home: Home) -> None:
    assert (home.project / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (home.project / "data/latest").readlink() == Path("mine.csv")


@pytest.mark.parametrize("path", DELETED)
def test_what_the_owner_deleted_stays_deleted(home: Home, path: str) -> None:
    assert not (home.project / path).exists()


@pytest.mark.parametrize(
    ("path", "how"), [("configs/train.yaml", edit), ("src/data/dataset.py", rewrite)]
)
def test_edits_of_the_owner_and_of_the_template_meet(
    home: Home, later: Path, path: str, how: Edit
) -> None:
    assert (home.project / path).read_bytes() == how((later / path).read_bytes())


def test_dependencies_of_the_owner_and_of_the_template_meet(home: Home, later: Path) -> None:
    mine, fresh = ((p / "pyproject.toml").read_text() for p in (home.project, later))
    own, template = tomllib.loads(mine), tomllib.loads(fresh)
    assert own["dependency-groups"].pop("notebooks") == ["another>=2.0"]
    assert own["project"]["dependencies"].pop() == "owners-metrics>=1.0"
    assert own == template
    assert set(fresh.splitlines()) <= set(mine.splitlines())


def test_fixes_of_the_template_arrive_and_nothing_else_changes(home: Home, later: Path) -> None:
    prefix = home.project.relative_to(home.repository).as_posix() + "/"
    prefix = "" if prefix == "./" else prefix
    now = everything(home.repository)
    changed = {path for path in now | home.before if now.get(path) != home.before.get(path)}
    both = ["configs/train.yaml", "pyproject.toml", "src/data/dataset.py"]
    arrived = ["src/utils/seed.py", NEW_FILE]
    assert changed == {prefix + path for path in [".copier-answers.yml", *both, *arrived]}
    for path in arrived:
        assert (home.project / path).read_bytes() == (later / path).read_bytes()


def test_an_update_that_merges_leaves_no_conflict(home: Home) -> None:
    assert run("git", "ls-files", "--unmerged", cwd=home.repository).stdout == ""
    assert "<<<<<<<" not in run("git", "diff", cwd=home.repository).stdout


def test_the_projects_tests_run_again(home: Home) -> None:
    check_tests(home.project, "tests/test_project.py", NEW_FILE)


def test_a_lock_that_the_update_outdated_names_its_cure(home: Home, uv: Uv) -> None:
    error = run(*uv, "lock", "--check", cwd=home.project, code=1).stderr
    assert "run `uv lock`" in error
    assert "\n    uv lock\n" in (home.output.stderr if home.output else "")


@pytest.fixture
def twin(home: Home, tmp_path: Path) -> Path:
    """A copy of the updated project, committed, to change."""
    repository = shutil.copytree(home.repository, tmp_path / "repository", symlinks=True)
    commit(repository, "Update")
    return repository / home.project.relative_to(home.repository)


def test_locking_again_keeps_the_owners_versions(twin: Path, uv: Uv) -> None:
    before = versions(twin / "uv.lock")
    run(*uv, "lock", cwd=twin)
    run(*uv, "lock", "--check", cwd=twin)
    after = versions(twin / "uv.lock")
    assert after == before
    assert (after["owners-metrics"], after[OLD_PIN[0]]) == ("1.0", OLD_PIN[1])


def test_removing_the_lock_takes_the_versions_of_the_template(
    twin: Path, later: Path, uv: Uv
) -> None:
    run("git", "rm", "-q", "uv.lock", cwd=twin)
    commit(twin, "Take the template's lock")
    update(twin)
    assert (twin / "uv.lock").read_bytes() == (later / "uv.lock").read_bytes()
    run(*uv, "lock", cwd=twin)
    assert versions(twin / "uv.lock") == versions(later / "uv.lock") | {
        "another": "2.0",
        "owners-metrics": "1.0",
    }


def test_an_update_without_new_dependencies_leaves_the_lock_checked(
    template: Path, later: Path, uv: Uv, tmp_path: Path
) -> None:
    project = shutil.copytree(later, tmp_path / "project")
    run(*uv, "add", "--no-sync", "owners-metrics", cwd=project)
    commit(project, "Add a dependency")
    moved = move_on(template, project, tmp_path)
    update(project)
    assert (project / "src/utils/seed.py").read_bytes() == moved
    run(*uv, "lock", "--check", cwd=project)


def test_a_torch_for_an_older_cuda_survives_an_update(
    earlier: Path, later: Path, tmp_path: Path
) -> None:
    # The README's commands, but for the first, which asks uv for the address, and the last.
    readme = (later / "README.md").read_text()
    recipe = readme.split("### An older driver")[1].split("```sh\n")[1].splitlines()[1:3]
    project = shutil.copytree(earlier, tmp_path / "project")
    address = "https://wheels.invalid/cu126"
    run("sh", "-c", "\n".join([f"address={address}", *recipe]), cwd=project)
    before = tomllib.loads((project / "pyproject.toml").read_text())["tool"]["uv"]
    assert before["sources"] == {"torch": {"index": "pytorch"}}
    assert before["index"] == [{"name": "pytorch", "url": address, "explicit": True}]
    commit(project, "Take a torch for an older CUDA")
    lock = (project / "uv.lock").read_bytes()
    update(project)
    text = (project / "pyproject.toml").read_text()
    after = tomllib.loads(text)["tool"]["uv"]  # which conflict markers would break
    assert {name: after[name] for name in ("sources", "index")} == {
        name: before[name] for name in ("sources", "index")
    }
    assert '"torch>=2.11"' in text, "and the template's own change has arrived"
    assert (project / "uv.lock").read_bytes() == lock


def move_on(template: Path, project: Path, folder: Path) -> bytes:
    """Give a project a template of its own, with one more release; return the file it changed."""
    own = clone(template, folder)
    answers = project / ".copier-answers.yml"
    answers.write_text(answers.read_text().replace(str(template), str(own)))
    commit(project, "Follow another template")
    source = own / "template/src/utils/seed.py"
    source.write_text(source.read_text() + "\n# A later fix.\n")
    releases.release(own, "10000.0")
    return source.read_bytes()


def clone(template: Path, folder: Path) -> Path:
    run("git", "clone", "-q", template, folder / "clone", cwd=folder)
    return folder / "clone"


@pytest.fixture
def conflicted(earlier: Path, tmp_path: Path) -> Path:
    """A project in which the owner changed the very line that the template changed."""
    project = shutil.copytree(earlier, tmp_path / "project")
    lines = (project / "src/data/dataset.py").read_bytes().splitlines(keepends=True)
    lines[0] = b'"""My own words."""\n'
    (project / "src/data/dataset.py").write_bytes(b"".join(lines))
    commit(project, "Rewrite a line")
    update(project)
    return project


def test_what_both_changed_is_a_visible_conflict(conflicted: Path, later: Path) -> None:
    text = (conflicted / "src/data/dataset.py").read_text()
    theirs = (later / "src/data/dataset.py").read_text().splitlines()[0]
    words = ["<<<<<<< before updating", '"""My own words."""', "=======", theirs]
    assert text.splitlines()[:5] == [*words, ">>>>>>> after updating"]
    assert run("git", "status", "--porcelain", "src", cwd=conflicted).stdout.startswith("UU ")


def test_the_projects_tests_notice_a_conflict_until_it_is_settled(conflicted: Path) -> None:
    output = check_tests(conflicted, "tests/test_project.py", code=1).stdout
    assert "src/data/dataset.py" in output
    run("git", "checkout", "--ours", "src/data/dataset.py", cwd=conflicted)
    run("git", "add", "-A", cwd=conflicted)
    check_tests(conflicted, "tests/test_project.py")


def test_the_projects_tests_notice_a_rejected_patch(later: Path, tmp_path: Path) -> None:
    project = shutil.copytree(later, tmp_path / "project")
    (project / "src/config.py.rej").touch()
    assert "src/config.py.rej" in check_tests(project, "tests/test_project.py", code=1).stdout


def test_a_project_with_uncommitted_work_is_refused_and_left_alone(
    earlier: Path, tmp_path: Path
) -> None:
    project = shutil.copytree(earlier, tmp_path / "project")
    write(project, {"src/data/mine.py": b"OWN = True\n"})
    before = everything(project)
    assert "Please commit or stash" in update(project, code=1).stderr
    assert everything(project) == before
