"""The exceptions that people read instead of a traceback; `src/utils/script.py` prints them."""


class UserError(Exception):
    """Bad input: one line per problem, each saying what is wrong, where, and what to do.

    Scripts print the lines and exit with code 2; nobody needs a traceback to correct a typo.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class RunError(Exception):
    """A run that cannot go on: a full disk, no memory left, a loss that is not a number.

    What was saved before stays whole. Scripts print the message and exit with code 1.
    """


class Interrupted(Exception):
    """A run that a signal stopped, after its state was saved.

    Attributes:
        exit_code: 143 after SIGTERM, 130 after SIGINT.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def first_line(error: BaseException) -> str:
    """An error's type and first line; of an error that Dynamo wraps, those of the inner one."""
    cause = getattr(error, "inner_exception", error)
    lines = str(cause).strip().splitlines()
    most = 2 if lines and lines[0].endswith(":") else 1
    return f"{type(cause).__name__}: {' '.join(map(str.strip, lines[:most]))}"
