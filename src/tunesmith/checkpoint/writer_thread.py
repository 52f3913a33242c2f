"""A background writer thread with one task at a time, whose errors are raised in the thread that
asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import IntEnum
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

GRACE_SECONDS = 2.0
"""How long work that is abandoned may take to notice."""


class WriterState(IntEnum):
    """Ordered so that the largest of several ranks' is that of all together."""

    DONE = 0
    BUSY = 1
    FAILED = 2


class AbandonedWriteError(Exception):
    """Work was abandoned by who asked for it."""


class _Task:
    """Something to do, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.done = Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._work: Callable[[], Any] | None = work

    def do(self) -> None:
        work, self._work = self._work, None  # what it holds is free once it is done
        assert work is not None
        try:
            self.result = work()
        except BaseException as error:  # for who asks
            self.error = error
        finally:
            self.done.set()


class BackgroundWriter:
    """A piece of work under way, or done; nothing at first, which counts as done.

    One thread does them all: the memory that a thread takes for its own stays taken when it ends.
    It ends with `close`, or with this object.
    """

    def __init__(self) -> None:
        self._asked: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._piece: _Task | None = None
        self._left = Event()

    @property
    def state(self) -> WriterState:
        """What has become of the work."""
        if self._piece is None:
            return WriterState.DONE
        if not self._piece.done.is_set():
            return WriterState.BUSY
        return WriterState.DONE if self._piece.error is None else WriterState.FAILED

    def start(self, work: Callable[[], Any], *, here: bool = False) -> None:
        """Begin with `work`; `here` does it at once and on this thread. The last must be done."""
        self._piece = _Task(work)
        if here:
            self._piece.do()
            return
        if self._thread is None:
            self._thread = Thread(
                target=_serve, args=(self._asked,), name="checkpoint", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, self._asked.put, None)
        self._asked.put(self._piece)

    def join(self) -> None:
        """Wait until the work is done or has failed."""
        if self._piece is not None:
            self._piece.done.wait()

    def result(self) -> Any:
        """What the work returned.

        Raises:
            Exception: what it failed with, told once.
        """
        self.join()
        piece = self._piece
        if piece is None:
            return None
        error, piece.error = piece.error, None
        if error is not None:
            raise error
        return piece.result

    def between(self) -> None:
        """To be called by the work now and then.

        Raises:
            LeftUndoneError: it is not wanted any more.
        """
        if self._left.is_set():
            raise AbandonedWriteError

    def abandon(self) -> None:
        """Have the work leave off; it is not waited for if it does not notice soon."""
        self._left.set()
        self.close()

    def close(self) -> None:
        """End the thread, after what it is doing if that is soon."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(GRACE_SECONDS)
            self._thread = None


def _serve(asked: SimpleQueue[_Task | None]) -> None:
    while (piece := asked.get()) is not None:
        piece.do()
        del piece  # nothing of it is held while waiting for the next
