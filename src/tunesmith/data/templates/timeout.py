"""A time limit for untrusted template code: a watching thread raises an exception in it."""

from __future__ import annotations

import ctypes
import os
import threading
import time

from tunesmith.errors import DataError

_LOOKS = 0.25
"""Seconds between two looks at what is running."""
_IDLE = 40
"""Looks without anything running after which the watching thread ends."""


class TooSlow(DataError):
    """A chat template was stopped, since it took too much time."""

    def __init__(self) -> None:
        super().__init__(
            "the chat template goes on for too long with one row, and was stopped",
            where="data.template",
            hint="a loop in it may have no end; choose another: data.template=FILE.jinja",
        )

    def __reduce__(self) -> tuple[type[TooSlow], tuple[()]]:
        return TooSlow, ()


class TimeLimit:
    """Ends what takes more than so many seconds of processor time, with TooSlow in its thread.

    Between `enter` and `leave` a thread may use that much; time for which it is stopped, or waits
    for a processor, does not count. A thread of our own looks at those inside: to be inside is no
    more than to stand in a table, so that a thousand short texts cost nothing.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._inside: dict[int, list[int]] = {}
        self._watched = False
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def enter(self) -> list[int]:
        """Begin; the one number in the list is the caller's own, 0 at the beginning."""
        entry = [0]
        self._inside[threading.get_ident()] = entry
        if not self._watched:
            self._begin()
        return entry

    def leave(self) -> None:
        """End. Raises TooSlow if that is on its way to this thread."""
        entry = self._inside.pop(threading.get_ident(), ())
        if len(entry) > 1:
            # It must come here, not to whoever is next; after `enter` it may have come already.
            for _ in range(100):
                time.sleep(0.001)

    @property
    def entry(self) -> list[int]:
        """What `enter` returned to this thread; a new list outside."""
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
                # Whoever came in before that was said is still to be watched.
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
            # Marked before it is raised: who leaves between the two waits for it.
            entry.append(1)
            if self._inside.get(thread) is entry:
                _raise_in(thread)


def _used(thread: int) -> float:
    """Seconds of processor time that a living thread has used."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    except (AttributeError, OSError):  # not every system tells of another thread
        return time.monotonic()


def _raise_in(thread: int) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TooSlow))
