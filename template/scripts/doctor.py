"""Check a run before you pay for a GPU: `uv run scripts/doctor.py [CONFIG] [key=value ...]`.

Checks this machine, this project, the config's rows, and the memory and disk that the run needs.
Prints OK, WARN or FAIL for each, with the command or change that fixes it. Exit code 1 if anything
FAILs; nothing is changed. CONFIG and keys are those of scripts/train.py.
Paste the page when you ask somebody for help.
"""

import sys

from src.utils.script import run_script


def main(arguments: list[str]) -> None:
    """Check the config first, then import torch and print part by part."""
    from src.config import from_command_line

    config = from_command_line(arguments)

    from src.tools.doctor import examine

    verdicts = set()
    for part, findings in examine(config):
        print(part)
        for verdict, text, fix in findings:
            print(f"  {verdict:<4}  {text}")
            if fix and verdict != "OK":
                print(f"        → {fix}")
            verdicts.add(verdict)
    sys.exit("FAIL" in verdicts)


if __name__ == "__main__":
    run_script(main, __doc__)
