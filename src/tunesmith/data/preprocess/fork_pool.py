"""Worker processes (multiprocessing with the fork context) that answer messages through pipes; a
fork takes milliseconds.

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
from multiprocessing import current_process, get_context
from multiprocessing.process import BaseProcess
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
    if current_process().daemon:  # multiprocessing lets a daemon start no other
        return False
    others = {thread.name for thread in threading.enumerate()} - {HARMLESS, _WATCH}
    return others == {threading.main_thread().name}


class ForkedWorker:
    """A forked child that serves until its input ends; it has the methods of `subprocess.Popen`
    that we use.
    """

    def __init__(self, process: BaseProcess, stdin: BinaryIO, stdout: BinaryIO) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self.stdin = stdin
        self.stdout = stdout
        self._process = process

    def kill(self) -> None:
        """Kill the child if it still runs."""
        self._process.kill()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """Its exit code once it has ended."""
        self._process.join()
        return self._process.exitcode or 0  # None: another part of this program has waited for it


def fork(serve: Serve, *, others: Iterable[BinaryIO]) -> ForkedWorker:
    """Fork a child that calls `serve` with its input and output pipe, and then ends.

    `others` are the pipes to earlier children, which this child must close: they would keep those
    children's inputs open. Raises OSError where the system can't fork.
    """
    down, up = os.pipe(), os.pipe()
    unused = (down[1], up[0], *(pipe.fileno() for pipe in others))
    # As a daemon it is ended with this process; one that is not would be waited for.
    process = get_context("fork").Process(
        target=_run, args=(serve, unused, down[0], up[1], os.getpid()), daemon=True
    )
    try:
        with warnings.catch_warnings():
            # Python warns because it can't know which native threads matter to the child.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
    except BaseException:
        for end in (*down, *up):
            os.close(end)
        raise
    os.close(down[0])
    os.close(up[1])
    _grow_pipe(down[1])
    _grow_pipe(up[0])
    return ForkedWorker(process, os.fdopen(down[1], "wb"), os.fdopen(up[0], "rb"))


def _run(serve: Serve, unused: Iterable[int], source: int, out: int, parent: int) -> None:
    for end in unused:
        os.close(end)
    _detach_child(parent)
    with contextlib.suppress(OSError):  # the run has closed a pipe: nobody waits for the rest
        serve(os.fdopen(source, "rb"), os.fdopen(out, "wb"))


def _detach_child(parent: int) -> None:
    """Separate the child from the run's signals, output and memory; it ends when its parent
    ends.
    """
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
