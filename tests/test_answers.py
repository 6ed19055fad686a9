"""Hostile answers: refused in one line with nothing written, or rendered as the same text."""

import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from copier import run_copy, run_update

from helpers import copy, render, run, snapshot

# Text that is YAML, TOML, Jinja, OmegaConf or shell to whoever forgets to quote it.
AS_TEXT = [
    'says "hello"',
    "it's ''' quoted \"\"\"",
    r"back\slash \n \u0041 \N{DASH} \\",
    "🦙 👩‍💻 🏴󠁧󠁢󠁥󠁮󠁧󠁿 émigré 日本語 العربية",
    "{{ 7 * 7 }} {% raw %} {# no #} ${oc.env:HOME} $(id) `id` %(here)s",
    '", dependencies = ["evil"] #',
    "]]> </p> <script>alert(1)</script> | & ; ../..",
    "- item: [a, b] #comment",
    "&anchor *alias !!python/object:os.system",
    *("no", "null", "~", "1e3", "007", "2026-01-01", "0x1f", "---", "...", "=", "@", "#"),
]
REFUSED_LINES = [
    *("", " ", " text", "text ", "text\u00a0"),  # empty, or blanks at an end
    *("one\ntwo", "text\n", "one\rtwo", "one\ttwo", "one\x85two", "one\u2028two", "one\u2029two"),
    'text"\n[[tool.uv.index]]\nurl = "http://127.0.0.1"\nname = "x',  # an index injected as TOML
    *("\x1b[31mred", "one\x00two", "one\x7ftwo"),  # an escape sequence, null, delete
    *("one\u202etwo", "one\u2066two", "one\u200btwo", "\ufefftext"),  # bidi, zero width, BOM
    *("one\udcfftwo", "one\uffffttwo"),  # a lone surrogate, not a character
    "x" * 201,
]
REFUSED_NAMES = [
    *("", " ", "my finetune", "my-finetune\n", "🦙", "x" * 65, 'a"b', "{{a}}"),
    *[
        "My-Finetune",
        "my_finetune",
        "my.finetune",
        "ünïcode",
        "-my",
        "my-",
        "my--finetune",
        "2-fast",
        "..",
        ".",
        "../up",
        "a/b",
    ],
    *["torch", "transformers", "huggingface-hub", "pytest", "ruff", "json", "email", "asyncio"],
    *["src", "tests", "scripts", "configs", "data"],
]
REFUSED = {
    "description": REFUSED_LINES,
    "user_name": REFUSED_LINES,
    "project_name": REFUSED_NAMES,
    "user_email": [
        *("ada", "ada@", "@example.org", "ada@example", "ada@example.org\n", " ada@example.org"),
        *("ada@exa mple.org", 'a"@example.org', "a,b@example.org", "<ada@example.org>", "ä@b.org"),
    ],
    "github_user": ["..", ".", "a/b", "a b", "ada\n", "-ada", "ada-", 'a"b', "🦙", "x" * 101],
    "base_model": [
        *("", " ", " a/b", "a/b ", "a/b\n", 'a"b', "a'b", "${oc.env:HF_TOKEN}", "{{ a }}"),
        *("a\u202eb", "--option", "a#b", "a,b", "a=b", "x" * 201),
    ],
    "copyright_year": ["", "26", "20266", "2026\n", "MMXX", "٢٠٢٦"],
    "license": ["", "WTFPL", "mit", "none"],
    "quantization": ["", "int8", "4", "None"],
    "ci": ["", "GitHub Actions", "jenkins", "None"],
}
CASES = [
    pytest.param(question, answer, id=ascii(f"{question}-{answer}"[:40]))
    for question, answers in REFUSED.items()
    for answer in answers
]


@pytest.mark.parametrize(("question", "answer"), CASES)
def test_a_senseless_answer_is_refused(question: str, answer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=question):
        render(tmp_path / "project", **{question: answer})
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("project_name=torch", "question 'project_name': is taken: torch"),
        ("project_name=..", "question 'project_name': must be lower-case"),
        ('description=x"\n[[tool.uv.index]]', "question 'description': must be one line"),
        ("user_name=", "question 'user_name': must not be empty"),
        ("base_model=${oc.env:HF_TOKEN}", "question 'base_model': must be a hub id"),
        ("license=WTFPL", "Invalid choice for 'license': 'WTFPL'"),
    ],
)
def test_the_command_line_ends_with_the_reason(answer: str, reason: str, tmp_path: Path) -> None:
    output = copy(tmp_path / "project", "--data", answer, code=1).stderr
    assert reason in output.splitlines()[-1]
    assert not (tmp_path / "project").exists()


@pytest.mark.parametrize("text", AS_TEXT)
def test_any_other_text_is_rendered_as_it_is(text: str, tmp_path: Path) -> None:
    project = render(tmp_path, description=text, user_name=text, license="MIT")
    metadata = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    answers = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert metadata["description"] == metadata["authors"][0]["name"] == text
    assert answers["description"] == answers["user_name"] == text
    assert (
        f"Copyright (c) {answers['copyright_year']} {text}\n" in (project / "LICENSE").read_text()
    )


def test_text_from_the_command_line_is_rendered_as_it_is(tmp_path: Path) -> None:
    text = AS_TEXT[0] + AS_TEXT[3] + AS_TEXT[4]
    copy(tmp_path / "project", "--data", f"description={text}")
    metadata = tomllib.loads((tmp_path / "project/pyproject.toml").read_text())["project"]
    assert metadata["description"] == text


@pytest.mark.parametrize("text", [AS_TEXT[0], AS_TEXT[2], AS_TEXT[3], AS_TEXT[5]])
def test_a_project_with_odd_text_builds_and_keeps_its_lock(text: str, tmp_path: Path) -> None:
    project = render(tmp_path / "project", description=text, user_name=text, user_email="a@b.org")
    run("uv", "lock", "--check", "--offline", cwd=project)
    run("uv", "build", "--wheel", "--offline", "--out-dir", tmp_path, cwd=project)


@pytest.mark.parametrize(
    "model", ["gpt2", "Qwen/Qwen3-8B", "../models/my model", "~/m", "C:/m", "no"]
)
def test_a_model_reaches_the_configuration_as_text(model: str, tmp_path: Path) -> None:
    project = render(tmp_path, base_model=model)
    config = yaml.safe_load((project / "configs/train.yaml").read_text())
    assert config["model"]["name"] == model


@pytest.mark.parametrize("name", ["a", "llama-for-law", "torch-finetune", "x2", "null", "copier"])
def test_a_sensible_name_is_accepted(name: str, tmp_path: Path) -> None:
    project = render(tmp_path / "project", project_name=name)
    assert tomllib.loads((project / "pyproject.toml").read_text())["project"]["name"] == name
    run("uv", "lock", "--check", "--offline", cwd=project)


@pytest.mark.parametrize("ci", ["github", "gitlab", "none"])
def test_the_repository_is_linked_where_it_will_be_hosted(ci: str, tmp_path: Path) -> None:
    project = render(tmp_path, github_user="ada", ci=ci)
    urls = tomllib.loads((project / "pyproject.toml").read_text())["project"]["urls"]
    host = "gitlab" if ci == "gitlab" else "github"
    assert urls == {"Repository": f"https://{host}.com/ada/my-finetune"}


def test_a_name_that_a_later_lock_takes_stays_with_its_project(tmp_path: Path) -> None:
    template, project = tmp_path / "template", tmp_path / "project"
    shutil.copytree(snapshot().name, template)
    run("git", "tag", "1.0", cwd=template)
    run_copy(str(template), project, data={"project_name": "llama"}, defaults=True, quiet=True)
    for command in ("init -q -b main", "add -A", "commit -q -m Render"):
        run("git", *command.split(), cwd=project)
    with (template / "includes/reserved_names.txt").open("a") as names:
        names.write("llama\n")
    run("git", "commit", "-q", "-a", "-m", "Reserve a name", cwd=template)
    run("git", "tag", "2.0", cwd=template)
    run_update(project, defaults=True, overwrite=True, quiet=True)
    answers = yaml.safe_load((project / ".copier-answers.yml").read_text())
    assert (answers["project_name"], answers["_commit"]) == ("llama", "2.0")
