"""README.md's commands are the ones that are run."""

import re

from helpers import ROOT, SETTINGS

COMMANDS = re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == COMMANDS[1]


def test_the_readme_scaffolds_trains_and_asks_as_copiers_message_does() -> None:
    message = [line.strip() for line in SETTINGS["_message_after_copy"].splitlines()]
    for command in COMMANDS[0].split(" && ")[-3:]:
        assert command in message


def test_the_readme_gives_copier_an_absolute_path() -> None:
    # A relative one would be recorded as it stands, and `copier update` would not find it.
    assert 'copier copy --defaults "$PWD" ' in COMMANDS[0]
