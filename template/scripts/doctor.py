"""Look before the GPU hour: `uv run scripts/doctor.py [CONFIG] [key=value ...] [--json]`.

Says of this machine, this project, the config's rows and its memory what is OK, what to WARN of and
what would FAIL, with the command that mends it. Exit code 1 if something FAILs; nothing is changed.
CONFIG and keys are those of scripts/train.py. Paste the page when you ask somebody for help.
"""

import json
import shlex
import sys
from collections.abc import Iterable

from src.doctor import Finding
from src.utils.environment import PROJECT_ROOT, load_environment
from src.utils.errors import UserError, run_script
from src.utils.imports import quick_imports

COLOURS = {"OK": "\033[32m", "WARN": "\033[33m", "FAIL": "\033[31m"}
PLAIN = "\033[0m"
GREEN = ("\033[32m", PLAIN)


def main(arguments: list[str]) -> None:
    """Print every finding, part by part."""
    if "-h" in arguments or "--help" in arguments:
        print(__doc__.strip())
        return
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    load_environment()
    from src.config import from_command_line

    config, _ = from_command_line(arguments)
    coloured = sys.stdout.isatty() and not as_json

    with quick_imports():
        from src.doctor.machine import check_machine
        from src.doctor.memory import check_memory
        from src.doctor.project import check_project
        from src.doctor.rows import check_rows
        from src.training.plan import plan

    planned, why_not = None, ""
    try:
        planned = plan(config)
    except UserError as error:
        why_not = error.problems[0]
    except Exception as error:  # noqa: BLE001 - a model that cannot be walked without data
        why_not = f"{type(error).__name__} in walking this model"
    marks = GREEN if coloured else ("[", "]")
    rows = list(check_rows(config, marks, shlex.join(arguments)))
    if any(each.what == why_not for each in rows):
        why_not = "see above"
    parts: dict[str, Iterable[Finding]] = {
        "machine": check_machine(config, planned),
        "project": check_project(config, PROJECT_ROOT),
        "data and template": rows,
        "memory plan": check_memory(config, planned, why_not),
    }
    page: dict[str, list[Finding]] = {}
    for name, findings in parts.items():
        if not as_json:
            print(f"\n{name}" if page else name)
        page[name] = list(findings) if as_json else [_show(each, coloured) for each in findings]
    if as_json:
        told = {name: [each._asdict() for each in found] for name, found in page.items()}
        print(json.dumps(told, ensure_ascii=False))
    sys.exit(any(each.verdict == "FAIL" for found in page.values() for each in found))


def _show(finding: Finding, coloured: bool) -> Finding:
    colour, plain = (COLOURS[finding.verdict], PLAIN) if coloured else ("", "")
    text = finding.what.replace("\n", "\\n")
    print(f"  {colour}{finding.verdict:<4}{plain}  {text}", flush=True)
    if finding.mend and finding.verdict != "OK":
        print(f"        → {finding.mend}")
    return finding


if __name__ == "__main__":
    run_script(main)
