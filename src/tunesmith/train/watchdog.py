"""The watchdog thread: ends a run that hangs, and writes the stack of every thread."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tunesmith.display import unfailing
from tunesmith.distributed.hang_alarm import HangAlarm

AUTO_SECONDS = 3600.0
"""The shortest limit that is chosen by itself."""
AUTO_TIMES = 20.0
"""By itself the limit is at least this many times the longest pause so far."""
WRITE_SECONDS = 10.0
"""How long writing to the run folder may take, which may be what hangs."""
LOOK_SECONDS = 10.0
"""The longest time between two looks, at the beats and at what other ranks say."""

Minutes = Literal["auto"] | float | None


class Watchdog:
    """Waits for beats, which come with each micro-batch, save and evaluation.

    A time in which the whole process stood still, suspended or stopped by a signal, is not counted.

    Args:
        minutes: longest pause between two beats; `auto`: an hour, or 20 times the longest so far;
            None: there is none.
        folder: where the stacks are written.
        rank: of this process, None if it is alone.
    """

    def __init__(
        self,
        minutes: Minutes,
        folder: Path,
        *,
        rank: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = None if minutes is None or minutes == "auto" else 60.0 * float(minutes)
        self._auto = minutes == "auto"
        self._off = minutes is None
        self._clock = clock
        self._last = clock()
        self._longest = 0.0
        self._at = "the start"
        self._alarm = None if rank is None else HangAlarm(rank)
        self._done = threading.Event()
        self.stacks = folder / ("stacks.txt" if rank is None else f"stacks-rank-{rank}.txt")

    @property
    def limit(self) -> float:
        """Seconds."""
        if self._limit is not None:
            return self._limit
        return max(AUTO_SECONDS, AUTO_TIMES * self._longest)

    def beat(self, at: str | None = None) -> None:
        """Something was done; `at` says in words what comes now."""
        now = self._clock()
        if self._auto:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        self._at = at or self._at

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while inside."""
        if self._off:
            yield
            return
        self.beat()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()

    def _watch(self) -> None:
        last = self._clock()
        while not self._done.wait(tick := self._tick):
            now = self._clock()
            stood_still = now - last - tick
            if stood_still > max(5.0, tick):
                self._last += stood_still
            last = now
            if now - self._last > self.limit:
                self._end()
            elif self._alarm is not None and (other := self._alarm.heard()) is not None:
                self._end(other)

    @property
    def _tick(self) -> float:
        return min(LOOK_SECONDS, self.limit / 4)

    def _end(self, other: int | None = None) -> None:
        """Leave the stacks and end the process; `other` is the rank that no longer moves, if it is
        not this one that found out.
        """
        if other is None:
            why = f"nothing has moved for {self.limit / 60:.3g} min, at {self._at}"
        else:
            why = f"rank {other} has said that nothing moves; this one was at {self._at}"
        said = (
            f"error: {why}; the run is "
            f"ended\nhint: {self.stacks} has what each thread was doing; `tunesmith resume "
            f"{self.stacks.parent}` goes on from the last checkpoint, device.watchdog sets the "
            "limit\n"
        )
        stream = unfailing(sys.stderr)
        stream.write(f"\n{said}")
        stream.flush()
        if self._alarm is not None and other is None:
            self._alarm.ring()
        # A folder that can't be written in must not keep this thread, too.
        writer = threading.Thread(target=self._write_stacks, daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)
        if self._alarm is not None:
            # The others would take this rank for lost, and end before they have looked.
            time.sleep(self._tick + 1.0)
        os._exit(1)

    def _write_stacks(self) -> None:
        with open(self.stacks, "w", encoding="utf-8") as file:
            file.write(f"process {os.getpid()}, at {self._at}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
