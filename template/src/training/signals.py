"""SIGTERM and SIGINT finish the step, save and exit; a second one stops at once."""

import os
import shlex
import signal
import time
from types import FrameType
from typing import Self

from src.utils import distributed
from src.utils.errors import Interrupted


class StopSignal:
    """A context manager that remembers the first SIGTERM or SIGINT while it is active."""

    def __init__(self, command: list[str]) -> None:
        """`command`: the arguments of this run, to print how to resume it."""
        self._command = command
        self._received, self._at = 0, 0.0

    def __enter__(self) -> Self:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        # Within a second it is the same signal twice: a supervisor signals the process group, and
        # uv passes it on to its child.
        if self._received and time.monotonic() - self._at > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._received:
            self._received, self._at = number, time.monotonic()

    def requested(self) -> bool:
        """Whether any process got a signal: all must stop after the same step."""
        return distributed.all_sum(float(self._received > 0)) > 0

    def interruption(self, step: int, total_steps: int, saved: bool) -> Interrupted:
        """The error that ends the run, once its state is saved."""
        number = self._received or signal.SIGTERM  # another process received it
        where = "its state is saved" if saved else "nothing is saved: training.save_every is null"
        words = [word for word in self._command if not word.startswith("training.resume=")]
        resume = shlex.join(["uv", "run", "scripts/train.py", *words, "training.resume=auto"])
        return Interrupted(
            f"stopped by {signal.Signals(number).name} after step {step} of {total_steps}; "
            f"{where}\nresume: {resume}",
            128 + number,  # as a shell reports it
        )
