"""The exceptions that people read instead of a traceback, and the exit codes of the scripts."""

import sys
from collections.abc import Callable

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


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's `main` on the command line's arguments; its errors become exit codes."""
    try:
        main(sys.argv[1:])
    except (UserError, RunError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:  # while loading: a training saves its state first
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_SIGINT)
