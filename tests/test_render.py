"""What a render promises, whatever the answers."""

import itertools
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from helpers import QUESTIONS, ROOT, SETTINGS, TEMPLATE, choices, copy, files, render, run

CHOICE_QUESTIONS = [name for name, question in QUESTIONS.items() if "choices" in question]
# Each pair of two questions' answers is in one of these. All 252 would take minutes and prove no more:
# no file depends on three answers.
WHOLE = [choices(name) for name in CHOICE_QUESTIONS]
COMBINATIONS = [
    (own, quantization, WHOLE[2][(m + n) % 3], WHOLE[3][(m + 3 * n) % 4])
    for m, own in enumerate(WHOLE[0])
    for n, quantization in enumerate([*WHOLE[1], WHOLE[1][m % 3]])
]
# For every question an answer that is not its default.
OTHER_ANSWERS = {
    "project_name": "llama-for-law",
    "description": "Answers questions about contracts.",
    "user_name": "Ada Lovelace",
    "user_email": "ada@example.org",
    "github_user": "ada-lovelace",
    "license": "MIT",
    "copyright_year": "1843",
    "base_model": "Qwen/Qwen3-8B",
    "quantization": "8bit",
    "ci": "gitlab",
    "launcher": "slurm",
}


def test_each_pair_of_answers_is_in_a_combination() -> None:
    for first, second in itertools.combinations(range(len(WHOLE)), 2):
        pairs = {(combination[first], combination[second]) for combination in COMBINATIONS}
        assert pairs == set(itertools.product(WHOLE[first], WHOLE[second]))


@pytest.fixture(scope="session", params=COMBINATIONS, ids="-".join)
def combination(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One project per combination of the choice questions' answers."""
    answers = dict(zip(CHOICE_QUESTIONS, request.param, strict=True))
    return render(tmp_path_factory.mktemp("combination") / "project", **answers)


def test_the_lock_of_every_combination_checks_offline(combination: Path, tmp_path: Path) -> None:
    run("uv", "lock", "--check", "--offline", "--cache-dir", tmp_path, cwd=combination)


def test_every_data_file_of_every_combination_parses(combination: Path) -> None:
    for path, content in files(combination).items():
        text = content.decode()
        if path.endswith(".toml") or path == "uv.lock":
            tomllib.loads(text)
        elif path.endswith((".yml", ".yaml")):
            list(yaml.safe_load_all(text))
        elif path.endswith(".json"):
            json.loads(text)
        elif path.endswith(".jsonl"):
            [json.loads(line) for line in text.splitlines()]


def test_python_files_are_the_same_bytes_in_every_combination(
    combination: Path, project: Path
) -> None:
    def python(folder: Path) -> dict[str, bytes]:
        return {path: data for path, data in files(folder).items() if path.endswith(".py")}

    assert python(combination) == python(project)


def test_copy_with_defaults_needs_neither_trust_nor_network(tmp_path: Path) -> None:
    copy(tmp_path / "project")
    assert (tmp_path / "project/uv.lock").exists()


def test_the_template_asks_for_nothing_that_needs_trust() -> None:
    assert SETTINGS.keys().isdisjoint({"_tasks", "_migrations", "_jinja_extensions"})


def test_every_question_has_another_answer_in_these_tests() -> None:
    assert OTHER_ANSWERS.keys() == QUESTIONS.keys()


@pytest.mark.parametrize("question", OTHER_ANSWERS)
def test_another_answer_changes_a_file(question: str, project: Path, tmp_path: Path) -> None:
    before = files(project)
    after = files(render(tmp_path / "project", **{question: OTHER_ANSWERS[question]}))
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    assert changed - {".copier-answers.yml"}


def test_every_question_has_a_help_and_a_default() -> None:
    asked = {name: each for name, each in QUESTIONS.items() if each.get("ask", True)}
    assert [name for name, each in asked.items() if not each["help"]] == []
    assert [name for name, each in QUESTIONS.items() if "default" not in each] == []


def test_every_free_text_answer_is_validated() -> None:
    assert [n for n, q in QUESTIONS.items() if not ("choices" in q or "validator" in q)] == []


def test_answers_are_recorded_for_the_next_update(project: Path) -> None:
    recorded = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert recorded.keys() == QUESTIONS.keys() | {"_commit", "_src_path"}


def test_no_template_syntax_is_left_in_a_path(project: Path) -> None:
    assert [path for path in files(project) if re.search(r"\.jinja$|[{}%]", path)] == []


def test_no_answer_reaches_a_python_file() -> None:
    answer = re.compile(rf"{{[{{%][^}}]*\b({'|'.join(QUESTIONS)}|_copier\w+)\b")
    assert list(TEMPLATE.rglob("*.py.jinja")) == []
    assert [path for path in TEMPLATE.rglob("*.py") if answer.search(path.read_text())] == []


def test_file_names_in_the_template_are_valid_on_windows() -> None:
    parts = {part for path in TEMPLATE.rglob("*") for part in path.relative_to(TEMPLATE).parts}
    assert [part for part in parts if re.search(r'[<>:"|?*\\]', part)] == []


def test_a_file_of_secrets_is_never_rendered(combination: Path) -> None:
    assert not (combination / ".env").exists()
    assert (combination / ".env.example").exists()


def test_the_example_of_secrets_sets_nothing(project: Path) -> None:
    lines = (project / ".env.example").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []
    for name in ("HF_TOKEN", "HF_HOME", "MLFLOW_TRACKING_URI", "CUDA_VISIBLE_DEVICES"):
        assert any(line.startswith(f"# {name}=") for line in lines)


@pytest.fixture
def repository(project: Path, tmp_path: Path) -> Path:
    """A copy of the default project, in a repository of its own."""
    shutil.copytree(project, tmp_path / "project")
    run("git", "init", "-q", "-b", "main", cwd=tmp_path / "project")
    return tmp_path / "project"


def test_git_ignores_no_file_of_a_fresh_project(repository: Path) -> None:
    run("git", "add", "-A", cwd=repository)
    tracked = set(run("git", "ls-files", cwd=repository).stdout.splitlines())
    assert tracked == {path for path in files(repository) if not path.startswith(".git/")}


def test_git_ignores_no_source_that_its_owner_adds(repository: Path) -> None:
    own = ["src/data/mine.py", "src/models/mine.py", "data/mine.jsonl", "src/outputs/mine.py"]
    run("git", "check-ignore", *own, cwd=repository, code=1)


def test_git_ignores_secrets_and_what_a_run_writes(repository: Path) -> None:
    written = [".env", ".env.local", "outputs/smoke/final/model.safetensors", "mlflow.db"]
    written += ["mlflow.db-wal", "mlruns/1/meta.yaml", "data/cache/x", ".venv/bin/python"]
    ignored = run("git", "check-ignore", *written, cwd=repository).stdout.splitlines()
    assert ignored == written


def test_git_ignores_no_file_of_the_template() -> None:
    # An ignored file would be missing from every clone, and so from every render.
    paths = run("git", "ls-files", "template", cwd=ROOT).stdout.splitlines()
    paths += ["template/src/data/new.py", "template/data/new.jsonl", "template/tests/new.py"]
    run("git", "check-ignore", "--no-index", *paths, cwd=ROOT, code=1)


@pytest.mark.parametrize("license", choices("license"))
def test_the_license_is_the_one_that_was_chosen(license: str, tmp_path: Path) -> None:
    first_words = {
        "Apache-2.0": "Apache License Version 2.0",
        "MIT": "MIT License",
        "BSD-3-Clause": "BSD 3-Clause License",
        "MPL-2.0": "Mozilla Public License Version 2.0",
        "GPL-3.0-or-later": "GNU GENERAL PUBLIC LICENSE Version 3",
        "Proprietary": "Copyright (c) 1843 Ada",
    }
    project = render(tmp_path, license=license, user_name="Ada", copyright_year="1843")
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    if license == "None":
        assert not (project / "LICENSE").exists()
        assert "license" not in metadata
    else:
        words = " ".join((project / "LICENSE").read_text().split())
        assert words.startswith(first_words[license])
        assert metadata["license"] == {"Proprietary": "LicenseRef-Proprietary"}.get(
            license, license
        )


@pytest.mark.parametrize("license", ["Apache-2.0", "MIT", "BSD-3-Clause", "Proprietary"])
def test_the_license_names_its_year_and_holder(license: str, tmp_path: Path) -> None:
    project = render(tmp_path, license=license, user_name="Ada Ünïcode", copyright_year="1843")
    assert re.search(r"Copyright (\(c\) )?1843,? Ada Ünïcode", (project / "LICENSE").read_text())


def test_the_message_after_a_copy_enters_a_folder_with_an_odd_name(tmp_path: Path) -> None:
    folder = tmp_path / "it's a $project"
    message = copy(folder).stderr
    enter = next(line for line in message.splitlines() if line.startswith("    cd "))
    assert run("bash", "-c", f"{enter} && pwd", cwd=tmp_path).stdout.strip() == str(folder)
