"""What all scripts share: `.env`, `--help`, quick imports, and exit codes instead of tracebacks."""

import atexit
import gc
import io
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import NoReturn

from src.utils.environment import load_environment
from src.utils.errors import Interrupted, RunError, UserError
from src.utils.files import FULL
from src.utils.ranks import RANK, WORLD_SIZE

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_SIGINT = 130  # 128 + the signal's number, as a shell reports it
EXIT_SIGPIPE = 141


def run_script(main: Callable[[list[str]], None], help_text: str = "") -> None:
    """Run a script's `main` on the command line's arguments; its errors become exit codes.

    Args:
        main: imports torch inside, after `.env` was read and its own checks have passed.
        help_text: what --help prints, of a script that has no parser of its own.
    """
    arguments = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where it is not UTF-8; and a line appears at once where it is a pipe, as under torchrun.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        if help_text and {"-h", "--help"} & set(arguments):
            print(help_text.strip())
            return
        load_environment()
        main(arguments)
        sys.stdout.flush()
    except (UserError, RunError) as error:
        lines = [f"error: {line}" for line in str(error).splitlines()]
        _leave(lines, EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED)
    except (Interrupted, KeyboardInterrupt) as stop:  # all processes stop after one step
        code = stop.exit_code if isinstance(stop, Interrupted) else EXIT_SIGINT
        _leave([] if RANK else [str(stop) or "interrupted"], code)
    except SyntaxError as error:  # in the project's own code, as after an update with conflicts
        place = f"{error.filename}:{error.lineno}: {error.msg}"
        _leave([f"error: {place}: {(error.text or '').strip()}"], EXIT_BAD_INPUT)
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):
            raise  # of another pipe, to a worker say
        # Nobody reads on, as in `look.py | head`. The interpreter's own end would try to write.
        os._exit(EXIT_SIGPIPE)
    except Exception as error:
        # A place that cannot be used, and not a bug; a lost connection has no file name.
        if isinstance(error, OSError) and (error.filename or error.errno in FULL):
            place = f"{error.filename}: " if error.filename else ""
            code = EXIT_FAILED if error.errno in FULL else EXIT_BAD_INPUT
            _leave([f"error: {place}{error.strerror}"], code)
        if WORLD_SIZE == 1:
            raise
        lost = any(sign in str(error) for sign in ("gloo", "NCCL", "closed by peer"))
        _leave(traceback.format_exc().splitlines(), EXIT_FAILED, late=lost)


@contextmanager
def quick_imports() -> Generator[None]:
    """Import torch, transformers and peft inside it: 0.7 of 6.5 s less, as no garbage is collected.

    Imports make 700,000 objects that stay; the collector would walk them again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()  # the collector does not look at them while training either
        atexit.register(gc.unfreeze)  # else libraries in C++ report leaks at the end


def _leave(lines: list[str], code: int, late: bool = False) -> NoReturn:
    """Print and exit; of many processes only the one whose error it is gets to print.

    torchrun ends the others once the first has exited. So the main process prints at once, the
    others a little later, if they are still running, and last those that only lost another one.
    """
    if WORLD_SIZE > 1:
        time.sleep(10 if late else 2 * (RANK > 0))
    sys.stdout.flush()
    mark = f"[rank {RANK}] " if RANK else ""
    print("".join(f"{mark}{line}\n" for line in lines), end="", file=sys.stderr, flush=True)
    if WORLD_SIZE > 1:
        os._exit(code)  # the interpreter's own end would wait for the communication's threads
    sys.exit(code)
