"""Worker processes (multiprocessing with the fork context) that answer messages through pipes; a
fork starts in milliseconds.

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
from multiprocessing import current_process, get_context
from multiprocessing.process import BaseProcess
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
    if current_process().daemon:  # multiprocessing lets a daemon start no other
        return False
    others = {thread.name for thread in threading.enumerate()} - {HARMLESS, _WATCH}
    return others == {threading.main_thread().name}


class ForkedWorker:
    """A copy that serves until its input ends; with the methods of `subprocess.Popen` we use."""

    def __init__(self, process: BaseProcess, stdin: BinaryIO, stdout: BinaryIO) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self.stdin = stdin
        self.stdout = stdout
        self._process = process

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self._process.kill()

    def poll(self) -> int | None:
        """Its exit code, below 0 for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """Its exit code once it has ended."""
        self._process.join()
        return self._process.exitcode or 0  # None: somebody else of this program waited for it


def fork(serve: Serve, *, others: Iterable[BinaryIO]) -> ForkedWorker:
    """A copy of this process that calls `serve` with its input and output, and ends.

    `others` are the pipes to earlier copies, which it must not keep open. Raises OSError where
    there can't be one.
    """
    down, up = os.pipe(), os.pipe()
    unused = (down[1], up[0], *(pipe.fileno() for pipe in others))
    # As a daemon it is ended with this process; one that is not would be waited for.
    process = get_context("fork").Process(
        target=_run, args=(serve, unused, down[0], up[1], os.getpid()), daemon=True
    )
    try:
        with warnings.catch_warnings():
            # Python can't know which native threads matter to the copy.
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
    _settle(parent)
    with contextlib.suppress(OSError):  # the run has closed a pipe: nobody waits for the rest
        serve(os.fdopen(source, "rb"), os.fdopen(out, "wb"))


def _settle(parent: int) -> None:
    """Stand apart from the run: its signals, its output, its memory, but end when it ends."""
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
