"""README.md's commands are the ones that are run."""

import re

from helpers import QUESTIONS, ROOT, SETTINGS, TEMPLATE

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == COMMANDS[1]


def test_the_readme_scaffolds_trains_and_asks_as_copiers_message_does() -> None:
    message = [line.strip() for line in SETTINGS["_message_after_copy"].splitlines()]
    for command in COMMANDS[0].split(" && ")[-3:]:
        assert command in message


def test_the_readme_gives_copier_an_absolute_path() -> None:
    # A relative one would be recorded as it stands, and `copier update` would not find it.
    assert 'copier copy --defaults "$PWD" ' in COMMANDS[0]


def test_the_readme_lists_every_question_with_its_key_default_and_choices() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    asked = {key: q for key, q in QUESTIONS.items() if q.get("ask", True)}
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert keys == list(asked)
    for key in keys:
        row = next(row for row in rows if f"`{key}`" in row.split("|")[1])
        choices = asked[key].get("choices", [])
        for choice in choices.values() if isinstance(choices, dict) else choices:
            assert f"`{choice}`" in row.split("|")[2]
        if "{{" not in (default := asked[key]["default"]) and default:
            assert f"`{default}`" in row.split("|")[3]


def test_a_heading_that_the_code_names_is_in_the_projects_readme() -> None:
    headings = re.findall(r"^#+ (.+)$", (TEMPLATE / "README.md.jinja").read_text(), re.MULTILINE)
    named = [
        heading
        for file in TEMPLATE.glob("s*/**/*.py")
        for heading in re.findall(r'README\.md, "([^"]+)"', " ".join(file.read_text().split()))
    ]
    assert len(named) >= 2
    assert set(named) <= set(headings)
