"""Look at the rows before training: `uv run scripts/look.py [CONFIG] [key=value ...]`.

Prints how rows were read, their lengths, how many tokens carry loss, which rows are left out or
duplicated, and the first documents as the model sees them: what carries loss is in colour, or
between [ and ] where the output is not a terminal. Nothing is trained.
CONFIG and keys are those of scripts/train.py.
"""

import sys

from src.utils.script import run_script

GREEN = ("\033[32m", "\033[0m")


def main(arguments: list[str]) -> None:
    """Check config and rows first, then import torch."""
    from src.config import from_command_line
    from src.preflight import check_run

    config = from_command_line(arguments)
    check_run(config, output=False)

    from src.tools.look import look

    marks = GREEN if sys.stdout.isatty() else ("[", "]")
    for line in look(config, marks):
        print(line)


if __name__ == "__main__":
    run_script(main, __doc__)
