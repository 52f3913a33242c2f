"""Forked worker processes that answer messages through pipes (`os.fork`); a fork takes
milliseconds.

Only the thread that forks exists in the child. So a fork is made only where no other Python thread
could hold a lock that the child would wait for. Native threads, such as torch's, may exist: the
child renders and tokenizes, and calls nothing that they serve.
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
"""The name of our own threads that hold no lock which a child needs."""
_WATCH = "templates"  # thread of the time limit, which resets itself in a child
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_PIPE_SIZE = 1 << 20

Serve = Callable[[BinaryIO, BinaryIO], None]


def may_fork() -> bool:
    """True if a fork is safe: on Linux, from the main thread, with no other Python thread."""
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return False
    others = {thread.name for thread in threading.enumerate()} - {HARMLESS, _WATCH}
    return others == {threading.main_thread().name}


class ForkedWorker:
    """A forked child that serves until its input ends; it has the methods of `subprocess.Popen`
    that we use.
    """

    def __init__(self, pid: int, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self._code: int | None = None

    def kill(self) -> None:
        """Kill the child if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
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
                self._code = 0  # another part of this program has waited for it
            else:
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
        return self._code


def fork(serve: Serve, *, others: Iterable[BinaryIO]) -> ForkedWorker:
    """Fork a child that calls `serve` with its input and output pipe, and then ends.

    `others` are the pipes to earlier children, which this child must close: they would keep those
    children's inputs open. Raises OSError where the system can't fork.
    """
    down, up = os.pipe(), os.pipe()
    try:
        with warnings.catch_warnings():
            # Python warns because it can't know which native threads matter to the child.
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
            _isolate_child()
            serve(os.fdopen(down[0], "rb"), os.fdopen(up[1], "wb"))
        finally:
            os._exit(0)
    os.close(down[0])
    os.close(up[1])
    _grow_pipe(down[1])
    _grow_pipe(up[0])
    return ForkedWorker(pid, os.fdopen(down[1], "wb"), os.fdopen(up[0], "rb"))


def _isolate_child() -> None:
    """Separate the child from the run's signals, output and memory; it ends when its parent
    ends.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    # The parent may have ended before the signal was requested.
    if os.getppid() != parent:
        os._exit(0)
    os.setsid()  # Ctrl-C reaches only the run, which then ends its children
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(2, 1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # garbage collection would write to, and so copy, the parent's pages


def _grow_pipe(pipe: int) -> None:
    with contextlib.suppress(OSError, AttributeError, ImportError):
        import fcntl

        command: Any = getattr(fcntl, "F_SETPIPE_SZ")  # noqa: B009 - since Python 3.10, on Linux
        fcntl.fcntl(pipe, command, _PIPE_SIZE)
