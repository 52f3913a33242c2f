"""Triggers of evaluations and checkpoints: every N steps, epochs or minutes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from tunesmith.config.values import Duration


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
