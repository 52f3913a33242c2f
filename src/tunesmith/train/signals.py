"""SIGINT and SIGTERM: noted at once, obeyed where nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FINISH_SECONDS = 5.0
"""How long after a signal a step or an evaluation may go on to its end. Preemption often leaves 30
seconds in all, and saving takes its own.
"""


class AbandonedError(Exception):
    """A step or an evaluation was left in the middle, for a signal's sake."""


class SignalHandler:
    """The signal that came, if any did."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = 0.0
        self.signal: int = 0

    def note(self, number: int, _: Any = None) -> None:
        """A signal's handler; a second signal stops at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal, self._since = number, self._clock()

    def check(self) -> None:
        """To be called between micro-batches.

        Raises:
            AbandonedError: a signal came and its time is up.
        """
        if self.signal and self._clock() - self._since > FINISH_SECONDS:
            raise AbandonedError

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM are noted; main thread only, nothing is done on others."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            old = {number: signal.signal(number, self.note) for number in numbers}
        except ValueError:  # not the main thread, a notebook server's for one
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
