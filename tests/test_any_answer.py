"""Any text at any free-text question is refused with one line, or renders to files that parse."""

import tempfile
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from copier._main import Worker
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from helpers import QUESTIONS, TEMPLATE, render, run, snapshot

FREE_TEXT = [name for name, question in QUESTIONS.items() if "choices" not in question]
# What text is made of that breaks whoever does not quote it; hypothesis strings these together.
PIECES = [
    *(
        "\"'",
        '"""',
        "\\",
        "\\u0041",
        "\n",
        "\r",
        "\t",
        "\x00",
        "\x85",
        "\u2028",
        "\u202e",
        "\ud800",
    ),
    *(
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "${",
        "}",
        "$(",
        "`",
        "[",
        "]",
        "#",
        ": ",
        "- ",
        "&a",
        "*a",
        "!",
    ),
    *(
        "|",
        ">",
        "---",
        "...",
        "=",
        ",",
        "@",
        "/",
        "..",
        "~",
        " ",
        "\u00a0",
        "-",
        "_",
        ".",
        "<",
        "%",
    ),
    *(
        "no",
        "null",
        "1e3",
        "0x1f",
        "torch",
        "src",
        "a",
        "Z",
        "9",
        "é",
        "🦙",
        "\u200d",
        "example.org",
    ),
]
ANYTHING = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(st.characters(exclude_categories=()), max_size=300),
    st.from_regex(r"[a-z][a-z0-9-]{0,70}", fullmatch=True),
    st.from_regex(r"[a-z.+]{1,9}@[a-z.-]{1,9}\.[a-z]{2}", fullmatch=True),
    st.from_regex(r"[\w./~@:+ -]{1,30}", fullmatch=True),
    st.from_regex(r"\d{3,5}", fullmatch=True),
)


@cache
def worker() -> Worker:
    """A worker of copier's, for its way of rendering; it asks and writes nothing."""
    return Worker(src_path=snapshot().name, dst_path=Path("nowhere"), quiet=True)


@cache
def compiled(source: str) -> Any:
    return worker().jinja_env.from_string(source)


def refusal(question: str, text: str) -> str:
    """Return what the validator of a question says about a text."""
    configuration = {"_copier_conf": {"overwrite": False}}
    return compiled(QUESTIONS[question]["validator"]).render(configuration | {question: text})


def defaults() -> dict[str, str]:
    answers = {name: str(question["default"]) for name, question in QUESTIONS.items()}
    return answers | {"user_name": "Ada", "copyright_year": "1843"}


def rendered(path: str, answers: dict[str, str]) -> str:
    """Render one file of the template."""
    return compiled((TEMPLATE / path).read_text()).render(answers | {"_copier_answers": answers})


def check(answers: dict[str, str]) -> None:
    """Read back every file that takes a free text, and find the answers in it."""
    project = tomllib.loads(rendered("pyproject.toml.jinja", answers))["project"]
    assert (project["name"], project["description"]) == (
        answers["project_name"],
        answers["description"],
    )
    email = {"email": answers["user_email"]} if answers["user_email"] else {}
    assert project["authors"] == [{"name": answers["user_name"]} | email]
    urls = list(project.get("urls", {}).values())
    expected = f"https://github.com/{answers['github_user']}/{answers['project_name']}"
    assert urls == ([expected] if answers["github_user"] else [])
    config = OmegaConf.create(rendered("configs/train.yaml.jinja", answers))
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    assert resolved["model"]["name"] == answers["base_model"]
    assert resolved["tracking"]["experiment"] == answers["project_name"]
    assert yaml.safe_load(rendered("{{ _copier_conf.answers_file }}.jinja", answers)) == answers
    assert answers["description"] in rendered("README.md.jinja", answers)


@pytest.mark.parametrize("question", FREE_TEXT)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=ANYTHING)
def test_any_text_is_refused_with_one_line_or_read_back_as_it_was(question: str, text: str) -> None:
    reason = refusal(question, text)
    if reason:
        assert len(reason.splitlines()) == 1
        assert reason.startswith(("must ", "is taken"))
    else:
        check(defaults() | {question: text})


ACCEPTED = st.fixed_dictionaries(
    {
        question: ANYTHING.filter(lambda text, question=question: not refusal(question, text))
        for question in FREE_TEXT
        if question not in ("project_name", "copyright_year", "user_email")
    }
    | {
        "project_name": st.from_regex(r"[a-z][a-z0-9]{0,9}(-[a-z0-9]{1,9}){0,3}", fullmatch=True),
        "user_email": st.sampled_from(["", "a+b_c%d@e-f.gh"]),
    }
)


# A failure is shown as it was found: to shrink it would take minutes of renders. What is drawn also
# depends on the constants of this repository's modules, so that some commit meets many refusals.
@settings(
    max_examples=4, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.filter_too_much],
)  # fmt: skip
@given(answers=ACCEPTED)
def test_accepted_texts_render_together_and_keep_the_lock(answers: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        project = render(Path(folder) / "project", **answers)
        run("uv", "lock", "--check", "--offline", "--cache-dir", f"{folder}/cache", cwd=project)
        run("uv", "build", "-q", "--wheel", "--offline", "--out-dir", folder, cwd=project)
