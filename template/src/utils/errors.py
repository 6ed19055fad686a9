"""The exceptions that people read instead of a traceback, and the exit codes of the scripts."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from src.utils.ranks import RANK, WORLD_SIZE

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SIGINT = 130  # 128 + the signal's number, as a shell reports it
EXIT_SIGTERM = 143


class UserError(Exception):
    """Bad input: one line per problem, each saying what is wrong, where, and what to do.

    Scripts print the lines and exit with code 2; nobody needs a traceback to mend a typo.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class RunError(Exception):
    """A run that cannot go on: a full disk, no memory left, a loss that is not a number.

    What was saved before stays whole. Scripts print the message and exit with code 1.
    """


class Interrupted(Exception):
    """A run stopped by a signal after its state was saved.

    Attributes:
        exit_code: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def first_line(error: BaseException) -> str:
    """An error's type and first line; of what Dynamo wraps, not of its long message about it."""
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main` on the command line's arguments; its errors become exit codes."""
    try:
        main(sys.argv[1:])
    except (UserError, RunError) as error:
        lines = [f"error: {line}" for line in str(error).splitlines()]
        _leave(lines, EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED)
    except Interrupted as stop:
        _leave([] if RANK else [str(stop)], stop.exit_code)  # all of them stop after one step
    except SyntaxError as error:  # in the project's own code, as after an update with conflicts
        place = f"{error.filename}:{error.lineno}: {error.msg}"
        _leave([f"error: {place}: {(error.text or '').strip()}"], EXIT_BAD_INPUT)
    except KeyboardInterrupt:  # while loading: a training saves its state first
        _leave([] if RANK else ["interrupted"], EXIT_SIGINT)
    except Exception as error:
        if WORLD_SIZE == 1:
            raise
        lost = any(sign in str(error) for sign in ("gloo", "NCCL", "closed by peer"))
        _leave(traceback.format_exc().splitlines(), EXIT_FAILED, late=lost)


def _leave(lines: list[str], code: int, late: bool = False) -> NoReturn:
    """Print and exit; of many processes only the one whose error it is gets to print.

    torchrun ends the others once the first has exited. So the main process speaks at once, the
    others a little later, if they are still there then, and last those that only lost another.
    """
    if WORLD_SIZE > 1:
        time.sleep(10 if late else 2 * (RANK > 0))
    sys.stdout.flush()
    mark = f"[rank {RANK}] " if RANK else ""
    print("".join(f"{mark}{line}\n" for line in lines), end="", file=sys.stderr, flush=True)
    if WORLD_SIZE > 1:
        os._exit(code)  # the interpreter's own end would wait for the communication's threads
    sys.exit(code)
