"""A pool of forked worker processes that answer messages through pipes; a fork starts in
milliseconds.

A copy has the one thread that asked for it, so copies are made only where no other thread of Python
could hold a lock that the copy would wait for. Native threads, of torch say, may be there: a copy
renders and tokenizes, and calls nothing that they serve.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

HARMLESS = "documents"
"""Name of our own threads that a copy does not need: they hold nothing that it waits for."""
_WATCH = "templates"  # of the clock, which forgets it in a copy
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_PIPE_SIZE = 1 << 20

Serve = Callable[[BinaryIO, BinaryIO], None]


def may_fork() -> bool:
    """True where a copy of this process is safe: on Linux, with no other thread of Python."""
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return False
    others = {thread.name for thread in threading.enumerate()} - {HARMLESS, _WATCH}
    return others == {threading.main_thread().name}


class ForkedWorker:
    """A copy that serves until its input ends; with the methods of `subprocess.Popen` we use."""

    def __init__(self, pid: int, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self._code: int | None = None

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """Its exit code, below 0 for a signal; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Its exit code once it has ended."""
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, flags: int) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, flags)
            except ChildProcessError:
                self._code = 0  # somebody else of this program has waited for it
            else:
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
        return self._code


def fork(serve: Serve, *, others: Iterable[BinaryIO]) -> ForkedWorker:
    """A copy of this process that calls `serve` with its input and output, and ends.

    `others` are the pipes to earlier copies, which it must not keep open. Raises OSError where
    there can't be one.
    """
    down, up = os.pipe(), os.pipe()
    try:
        with warnings.catch_warnings():
            # Python can't know which native threads matter to the copy.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
    except OSError:
        for end in (*down, *up):
            os.close(end)
        raise
    if pid == 0:
        try:
            for end in (down[1], up[0], *(pipe.fileno() for pipe in others)):
                os.close(end)
            _settle()
            serve(os.fdopen(down[0], "rb"), os.fdopen(up[1], "wb"))
        finally:
            os._exit(0)
    os.close(down[0])
    os.close(up[1])
    _grow_pipe(down[1])
    _grow_pipe(up[0])
    return ForkedWorker(pid, os.fdopen(down[1], "wb"), os.fdopen(up[0], "rb"))


def _settle() -> None:
    """Stand apart from the run: its signals, its output, its memory, but end when it ends."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    os.setsid()  # Ctrl-C is for the run, which then ends its copies
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(2, 1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # looking at what was there would copy its memory


def _grow_pipe(pipe: int) -> None:
    with contextlib.suppress(OSError, AttributeError, ImportError):
        import fcntl

        command: Any = getattr(fcntl, "F_SETPIPE_SZ")  # noqa: B009 - since Python 3.10, on Linux
        fcntl.fcntl(pipe, command, _PIPE_SIZE)
