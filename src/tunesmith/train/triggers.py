"""What is due after a step: evaluations and checkpoints (every N steps, epochs or minutes), and the
stop that a signal (SIGINT, SIGTERM, SIGHUP) asks for, noted at once and obeyed where nothing is
lost.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tunesmith.config.values import Duration
from tunesmith.distributed.world import World

FINISH_SECONDS = 5.0
"""How long after a signal a step or an evaluation may go on to its end. Preemption often leaves 30
seconds in all, and saving takes its own.
"""


_HANGUP: Any = getattr(signal, "SIGHUP", None)  # Windows has none


class Trigger:
    """Asked once after each step.

    Args:
        every: how often; None for never.
        epoch_after: epochs done after a step, counted from 0.
        clock: seconds that nothing sets back or forth.
    """

    def __init__(
        self,
        every: Duration | None,
        epoch_after: Callable[[int], float],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every = every
        self._epoch_after = epoch_after
        self._clock = clock
        self._since = clock()

    def due(self, step: int) -> bool:
        """Whether it is due after `step` steps."""
        if self._every is None:
            return False
        value = self._every.value
        if self._every.unit == "steps":
            return step % int(value) == 0
        if self._every.unit == "minutes":
            due = self._clock() - self._since >= 60 * value
            if due:
                self._since = self._clock()
            return due
        before = self._epoch_after(step - 2) if step > 1 else 0.0
        # a hair is added since 0.1 + 0.2 must reach 0.3
        return math.floor(self._epoch_after(step - 1) / value + 1e-9) > math.floor(
            before / value + 1e-9
        )


class Scheduled(NamedTuple):
    """What is due after a step, the same on every rank."""

    evaluation: bool
    checkpoint: bool
    signal: int  # that any rank received, 0 for none
    writer: int  # the state of the slowest checkpoint writer


class Schedule:
    """What is due after each step, by the clock of rank 0, so that the ranks act together."""

    def __init__(self, evaluations: Trigger, checkpoints: Trigger, world: World) -> None:
        self._evaluations, self._checkpoints, self._world = evaluations, checkpoints, world

    def after(self, step: int, *, signal: int, writer: int) -> Scheduled:
        """What is due, where `signal` and `writer` are this rank's."""
        main = self._world.is_main
        evaluates = main and self._evaluations.due(step)
        saves = main and self._checkpoints.due(step)
        due = self._world.all_reduce_max([evaluates, saves, signal, writer])
        return Scheduled(bool(due[0]), bool(due[1]), int(due[2]), int(due[3]))


class AbandonedError(Exception):
    """A step or an evaluation was left in the middle, for a signal's sake."""


class SignalHandler:
    """The signal that came, if any did."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        say: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._clock = clock
        self._say = say  # called once, inside the signal's handler
        self._since = 0.0
        self.signal: int = 0

    def note(self, number: int, _: Any = None) -> None:
        """A signal's handler; a second signal stops at once.

        A terminal that closes often sends SIGHUP twice, from the kernel and from the shell, so that
        a second one of these asks for nothing more.
        """
        if self.signal:
            if number == _HANGUP:
                return
            raise KeyboardInterrupt
        self.signal, self._since = number, self._clock()
        self._say(number)

    def check(self) -> None:
        """To be called between micro-batches.

        Raises:
            AbandonedError: a signal came and its time is up.
        """
        if self.signal and self._clock() - self._since > FINISH_SECONDS:
            raise AbandonedError

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP are noted; main thread only, nothing is done on others.

        A SIGHUP that was ignored from the start, as under nohup, stays ignored.
        """
        numbers = [signal.SIGINT, signal.SIGTERM]
        if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
            numbers.append(_HANGUP)
        try:
            old = {number: signal.signal(number, self.note) for number in numbers}
        except ValueError:  # not the main thread, a notebook server's for one
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
