"""The rules of CONTRIBUTING.md for changing the template, against what the last release promised."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

import release
import releases
from helpers import ROOT, TEMPLATE, run, snapshot

LAST = json.loads((ROOT / "tests/last_release.json").read_text())
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="session")
def now() -> dict[str, Any]:
    """What the working tree promises."""
    return release.promises(Path(snapshot().name))


def test_no_question_of_the_last_release_is_renamed_or_dropped(now: dict[str, Any]) -> None:
    assert LAST["questions"].keys() - now["questions"].keys() == set()


@pytest.mark.parametrize("question", LAST["questions"])
def test_no_choice_of_the_last_release_is_removed(question: str, now: dict[str, Any]) -> None:
    assert set(LAST["questions"][question]) <= set(now["questions"][question])


def test_no_file_of_the_last_release_is_moved_without_a_migration(now: dict[str, Any]) -> None:
    # copier would delete it with its owner's edits in it, and tell nobody.
    missing = set(LAST["files"]) - set(now["files"])
    migrations = json.dumps(yaml.safe_load((ROOT / "copier.yml").read_text()).get("_migrations"))
    assert {path for path in missing if path not in migrations} == set()


def test_the_last_releases_configuration_means_what_it_meant(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(LAST["configuration"])
    values = flat(release.resolve(tmp_path / "train.yaml", TEMPLATE))
    before = flat(LAST["values"])
    assert {key: values.get(key) for key in before} == before


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


# A process of Python that trains has seconds of imports before it: each of these does two things.
TRAIN_AN_ADAPTER = """
import runpy, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config = AutoConfig.from_pretrained("configs/tiny")
AutoModelForCausalLM.from_config(config).save_pretrained("outputs/base")
AutoTokenizer.from_pretrained("configs/tiny").save_pretrained("outputs/base")
runpy.run_path("scripts/train.py", run_name="__main__")
"""
LOAD_AND_RESUME = """
import runpy, torch
from src.trained import find_trained, load_trained
load_trained(find_trained("outputs/train/final"), torch.device("cpu"))
runpy.run_path("scripts/train.py", run_name="__main__")
"""


def test_what_the_last_release_trained_loads_and_resumes_after_the_update(
    template: Path, tmp_path: Path
) -> None:
    # Only releases promise this: a recorded commit that none contains had formats of its own.
    tags = [each for each in releases.recorded() if not re.fullmatch("[0-9a-f]{40}", each)]
    known = [each for each in tags if releases.is_known(each, template)]
    source = ("--vcs-ref", (known or [releases.EARLIER])[-1])
    project = releases.copy(template, tmp_path / "project", *source)
    options = ["configs/train.yaml", "model.name=outputs/base", "model.quantization=none"]
    options += ["data.max_length=64", "tracking.enabled=false", "training.save_every=1"]

    def python(code: str, *words: str) -> None:
        command = (sys.executable, "-c", code, *options, "device=cpu", *words)
        run(*command, cwd=project, PYTHONPATH=str(project))

    python(TRAIN_AN_ADAPTER, "training.max_steps=1")
    releases.update(project)
    checkpoint = "training.resume=outputs/train/checkpoints/step-00000001"
    python(LOAD_AND_RESUME, "training.max_steps=2", checkpoint, "output_dir=outputs/second")
    steps = [json.loads(line) for line in (project / "outputs/second/metrics.jsonl").open()]
    assert [each["step"] for each in steps if "step" in each][-1] == 2


def test_a_migration_turns_a_rename_into_a_visible_conflict(
    template: Path, later: Path, tmp_path: Path
) -> None:
    clone, project = tmp_path / "clone", shutil.copytree(later, tmp_path / "project")
    run("git", "clone", "-q", template, clone, cwd=tmp_path)
    answers = project / ".copier-answers.yml"
    answers.write_text(answers.read_text().replace(str(template), str(clone)))
    with (project / "src/utils/seed.py").open("a") as file:
        file.write("\n# Mine.\n")
    releases.commit(project, "Live in it")
    run("git", "mv", "template/src/utils/seed.py", "template/src/utils/luck.py", cwd=clone)
    with (clone / "copier.yml").open("a") as file:
        file.write(
            "\n_migrations:\n"
            "  - version: '10000.0'\n"
            "    command: git mv src/utils/seed.py src/utils/luck.py\n"
            "    when: \"{{ _stage == 'before' }}\"\n"
        )
    releases.release(clone, "10000.0")
    releases.update(project, "--trust")
    assert not (project / "src/utils/seed.py").exists()
    text = (project / "src/utils/luck.py").read_text()
    assert "<<<<<<< before updating\n\n# Mine.\n=======" in text


def test_the_changelog_has_one_newest_release_and_it_is_the_recorded_one() -> None:
    named = [Version(each) for each in release.versions(CHANGELOG)]
    assert named == sorted(named, reverse=True)
    assert str(named[0]) == release.versions(CHANGELOG)[0] == LAST["version"]
    assert releases.recorded()[-1] == LAST["version"]


def test_every_release_has_an_entry() -> None:
    assert [
        each for each in release.versions(CHANGELOG) if not release.entry(CHANGELOG, each)
    ] == []


def test_the_rules_in_contributing_are_numbered() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Changing the template")[1]
    numbers = re.findall(r"^(\d)\. ", section.split("\n## ")[0], re.MULTILINE)
    assert numbers == list("123456")


def test_no_recorded_release_lies_outside_this_history(template: Path) -> None:
    # Commits and older tags, that is: the newest is tagged once main is green.
    if (ROOT / ".git/shallow").exists():
        pytest.skip("a shallow clone: git fetch --tags --unshallow")
    missing = [each for each in releases.recorded()[:-1] if not releases.is_known(each, template)]
    assert missing == []


def test_no_run_of_the_project_is_committed_with_the_template() -> None:
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    left = {"metrics.jsonl", "record.json", "samples.jsonl", "run.json", "uncommitted.diff"}
    assert not [
        n for n in listed if Path(n).name in left or n.endswith(".lock") != (n == "uv.lock")
    ]
