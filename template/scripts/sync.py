"""Send MLflow what it has missed: `uv run scripts/sync.py RUN ...`.

RUN is the output folder of a run that has ended, such as outputs/train. Numbers, files and models
that MLflow has already are not sent again. Training prints this command when a server is down.
"""

from src.trained import find_runs
from src.utils.errors import RunError, UserError
from src.utils.script import run_script


def main(arguments: list[str]) -> None:
    """Send the runs one after the other."""
    folders = find_runs(arguments)
    if not folders:
        raise UserError("which run? give its output folder, such as outputs/train")

    from src.training.record import read_record, update_record
    from src.training.tracking import Sender, explain
    from src.utils.files import only_run_in

    for folder in folders:
        with only_run_in(folder):
            if read_record(folder)["status"] == "RUNNING":  # nobody holds the folder: it was killed
                update_record(folder, status="KILLED")
            try:
                sent = Sender(folder).send()
            except Exception as error:  # noqa: BLE001 - what MLflow, a server or a disk raises
                raise RunError(f"{folder}: MLflow failed ({explain(error)})") from None
        print(f"{folder}: MLflow has all of it; {sent} lines of metrics were missing")


if __name__ == "__main__":
    run_script(main, __doc__)
