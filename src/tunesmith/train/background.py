"""Work on a thread of its own, one piece at a time, whose errors come to who asked for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any

GRACE_SECONDS = 2.0
"""How long work that is abandoned may take to notice."""


class State(IntEnum):
    """Ordered so that the largest of several ranks' is that of all together."""

    DONE = 0
    BUSY = 1
    FAILED = 2


class LeftUndoneError(Exception):
    """Work was abandoned by who asked for it."""


class Background:
    """A piece of work under way, or done; nothing at first, which counts as done."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._left = threading.Event()
        self._error: BaseException | None = None
        self._result: Any = None

    @property
    def state(self) -> State:
        """What has become of the work."""
        if self._thread is not None and self._thread.is_alive():
            return State.BUSY
        return State.DONE if self._error is None else State.FAILED

    def start(self, work: Callable[[], Any], *, here: bool = False) -> None:
        """Begin with `work`; `here` does it at once and on this thread. The last must be done."""
        self._result = None
        if here:
            self._work(work)
            return
        self._thread = threading.Thread(
            target=self._work, args=(work,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def join(self) -> None:
        """Wait until the work is done or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def result(self) -> Any:
        """What the work returned.

        Raises:
            Exception: what it failed with, told once.
        """
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result

    def between(self) -> None:
        """To be called by the work now and then.

        Raises:
            LeftUndoneError: it is not wanted any more.
        """
        if self._left.is_set():
            raise LeftUndoneError

    def abandon(self) -> None:
        """Have the work leave off; it is not waited for if it does not notice soon."""
        self._left.set()
        if self._thread is not None:
            self._thread.join(GRACE_SECONDS)

    def _work(self, work: Callable[[], Any]) -> None:
        try:
            self._result = work()
        except BaseException as error:  # for who asks
            self._error = error
