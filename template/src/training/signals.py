"""SIGTERM and SIGINT finish the step, save and exit; a second one stops at once."""

import os
import signal
import time
from types import FrameType
from typing import Self

from src.utils import distributed
from src.utils.errors import Interrupted


class StopSignal:
    """A context manager that remembers the first SIGTERM or SIGINT while it is active."""

    def __init__(self) -> None:
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

    def interruption(self, step: int, total_steps: int) -> Interrupted:
        """The error that ends the run, once its state is saved."""
        number = self._received or signal.SIGTERM  # another process received it
        stopped = f"stopped by {signal.Signals(number).name} after step {step} of {total_steps}"
        again = "its state is saved: the same command with training.resume=auto goes on"
        return Interrupted(f"{stopped}; {again}", 128 + number)  # as a shell reports it
