"""Send MLflow what it has missed: `uv run scripts/sync.py RUN ...`.

RUN is the output folder of a run that has ended, such as outputs/train. Numbers, files and models
that MLflow has already are not sent again. Training prints this command when a server is down.
"""

import sys

from src.preflight import find_runs
from src.utils.environment import load_environment
from src.utils.errors import RunError, run_script


def main(arguments: list[str]) -> None:
    """Send the runs one after the other."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(__doc__.strip())
        sys.exit(0 if arguments else 2)
    load_environment()
    folders = find_runs(arguments)

    from src.training.record import Record
    from src.training.tracking import Sender
    from src.utils.files import only_run_in

    for folder in folders:
        with only_run_in(folder):
            record = Record(folder)
            # Nobody holds the folder, so a run that still says that it is running was killed.
            status = record.facts["status"].replace("RUNNING", "KILLED")
            try:
                sent = Sender(record).send(status)
            except Exception as error:  # noqa: BLE001 - what MLflow, a server or a disk raises
                raise RunError(f"{folder}: MLflow failed ({type(error).__name__})") from None
        print(f"{folder}: {f'{sent} lines and models sent' if sent else 'nothing was missing'}")


if __name__ == "__main__":
    run_script(main)
