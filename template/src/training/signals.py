"""SIGTERM and SIGINT finish the step, save and exit; a second one stops at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from src.training import distributed
from src.utils.errors import EXIT_SIGINT, EXIT_SIGTERM


class StopSignal:
    """Remembers the first signal; used as a context manager around the training loop."""

    def __init__(self) -> None:
        self._received, self._at = 0, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        # Within a second it is the same one: a supervisor signals the whole group, uv its child.
        if self._received and time.monotonic() - self._at > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._received:
            self._received, self._at = number, time.monotonic()

    def requested(self) -> bool:
        """Whether any process got a signal: all must stop after the same step."""
        return distributed.all_sum(float(self._received > 0)) > 0

    @property
    def name(self) -> str:
        """E.g. SIGTERM, also where another process received it."""
        return signal.Signals(self._received or signal.SIGTERM).name

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT."""
        return EXIT_SIGINT if self._received == signal.SIGINT else EXIT_SIGTERM
