"""A CPU time limit for untrusted template code: a watchdog thread raises an exception in the thread
that renders (`PyThreadState_SetAsyncExc`). Signals would work in the main thread only.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time

from tunesmith.errors import DataError

_LOOKS = 0.25
"""Seconds between two checks of the watchdog thread."""
_IDLE = 40
"""The watchdog thread ends after this many checks with nothing to watch."""


class TooSlow(DataError):
    """A chat template was stopped because it used too much CPU time."""

    def __init__(self) -> None:
        super().__init__(
            "the chat template ran too long on one row, and was stopped",
            where="data.template",
            hint="it may have an endless loop; use another template: data.template=FILE.jinja",
        )

    def __reduce__(self) -> tuple[type[TooSlow], tuple[()]]:
        return TooSlow, ()


class TimeLimit:
    """Raises TooSlow in a thread that uses more CPU time than `seconds` between `enter` and
    `leave`.

    Time in which the thread is stopped or waits for a CPU does not count. A watchdog thread checks
    the threads inside. `enter` and `leave` only write to a dict, so thousands of short texts cost
    nothing.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._inside: dict[int, list[int]] = {}
        self._watched = False
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def enter(self) -> list[int]:
        """Begin a limited section; returns a list with one number for the caller's use, 0 at
        first.
        """
        entry = [0]
        self._inside[threading.get_ident()] = entry
        if not self._watched:
            self._begin()
        return entry

    def leave(self) -> None:
        """End the section. Raises TooSlow here if it is on its way to this thread."""
        entry = self._inside.pop(threading.get_ident(), ())
        if len(entry) > 1:
            # The exception must arrive here and not in later code, so wait for it.
            for _ in range(100):
                time.sleep(0.001)

    @property
    def entry(self) -> list[int]:
        """The list that `enter` returned to this thread; a new list outside of a section."""
        return self._inside.get(threading.get_ident()) or [0]

    def _forget(self) -> None:
        self._inside.clear()
        self._watched = False
        self._lock = threading.Lock()

    def _begin(self) -> None:
        with self._lock:
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._look, daemon=True, name="templates").start()

    def _look(self) -> None:
        begun: dict[int, tuple[list[int], float]] = {}
        idle = 0
        while True:
            time.sleep(_LOOKS)
            idle = 0 if self._inside else idle + 1
            if idle > _IDLE:
                with self._lock:
                    self._watched = False
                # A thread that entered before the flag was cleared must still be watched.
                if not self._inside:
                    return
                self._watched, idle = True, 0
            for thread, entry in list(self._inside.items()):
                self._judge(thread, entry, begun)

    def _judge(
        self, thread: int, entry: list[int], begun: dict[int, tuple[list[int], float]]
    ) -> None:
        now = _used(thread)
        first = begun.get(thread)
        if first is None or first[0] is not entry:
            begun[thread] = (entry, now)
        elif now - first[1] > self.seconds:
            # Marked before the exception is raised, so that a thread that leaves in between waits
            # for it.
            entry.append(1)
            if self._inside.get(thread) is entry:
                _raise_in(thread)


def _used(thread: int) -> float:
    """The seconds of CPU time that a living thread has used."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    except (AttributeError, OSError):  # some systems have no CPU clock of another thread
        return time.monotonic()


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooSlow))
