"""Workflows, here and in the rendered project, against the schemas that their hosts publish."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from helpers import ROOT, TEMPLATE, choices, render, run

TOOLS = Path(sys.executable).parent
ROOT_WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def check(schema: str, *paths: Path) -> None:
    # The schemas are part of check-jsonschema: nothing is fetched.
    run(TOOLS / "check-jsonschema", "--builtin-schema", schema, *paths, cwd=ROOT)


def steps(workflow: Path) -> list[dict[str, str]]:
    return [
        s for job in yaml.safe_load(workflow.read_text())["jobs"].values() for s in job["steps"]
    ]


def commands(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("uv ")]


def test_the_workflows_of_this_repository_are_valid() -> None:
    assert ROOT_WORKFLOWS
    check("vendor.github-workflows", *ROOT_WORKFLOWS)


def test_the_rendered_github_workflow_is_valid(tmp_path: Path) -> None:
    check("vendor.github-workflows", render(tmp_path, ci="github") / ".github/workflows/ci.yml")


def test_the_rendered_gitlab_pipeline_is_valid(tmp_path: Path) -> None:
    check("vendor.gitlab-ci", render(tmp_path, ci="gitlab") / ".gitlab-ci.yml")


def test_the_rendered_commit_hooks_are_valid(project: Path) -> None:
    run(TOOLS / "pre-commit", "validate-config", ".pre-commit-config.yaml", cwd=project)


@pytest.mark.parametrize("ci", choices("ci"))
def test_a_project_has_the_workflow_of_its_host_and_no_other(ci: str, tmp_path: Path) -> None:
    project = render(tmp_path, ci=ci)
    found = {name for name in (".github", ".gitlab-ci.yml") if (project / name).exists()}
    assert found == {"github": {".github"}, "gitlab": {".gitlab-ci.yml"}, "none": set()}[ci]


def test_both_hosts_run_the_same_commands(tmp_path: Path) -> None:
    github = steps(render(tmp_path / "github", ci="github") / ".github/workflows/ci.yml")
    gitlab = yaml.safe_load(
        (render(tmp_path / "gitlab", ci="gitlab") / ".gitlab-ci.yml").read_text()
    )
    assert commands([step.get("run", "") for step in github]) == gitlab["test"]["script"]


def test_this_repository_renders_every_choice_in_its_own_ci() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    matrix = workflow["jobs"]["rendered"]["strategy"]["matrix"]["include"]
    for question in ("license", "quantization", "ci", "launcher"):
        assert {answers[question] for answers in matrix} == set(choices(question))


def test_this_repository_checks_a_render_as_the_render_checks_itself() -> None:
    rendered = TEMPLATE / "{% if ci == 'github' %}.github{% endif %}/workflows/ci.yml"
    own = "\n".join(step.get("run", "") for step in steps(ROOT / ".github/workflows/ci.yml"))
    for command in commands([step.get("run", "") for step in steps(rendered)]):
        assert command in own.splitlines()


@pytest.mark.parametrize(
    "workflow", [*ROOT_WORKFLOWS, *TEMPLATE.rglob("workflows/*.yml")], ids=lambda path: path.name
)
def test_a_workflow_may_read_and_nothing_more(workflow: Path) -> None:
    assert json.dumps(yaml.safe_load(workflow.read_text())["permissions"]) == '{"contents": "read"}'
