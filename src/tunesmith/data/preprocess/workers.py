"""Parallel preprocessing with worker processes, which start only where the data takes longer than
that.

They communicate through pipes. Where a fork is safe they are forked, which takes milliseconds.
Elsewhere they are new interpreters, which do not import the main module of the run again; so that
may be a notebook, or a script without a main guard.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

from tunesmith.data.preprocess.fork_pool import HARMLESS, ForkedWorker, fork, may_fork
from tunesmith.data.preprocess.render_batch import Options, Packed, Task, pack_batch
from tunesmith.data.rendering.tokenize import Encoder
from tunesmith.data.templates.template import Template
from tunesmith.errors import RunError, TunesmithError
from tunesmith.types import Origin

START_AFTER = 4.0
"""Seconds of work in this process before interpreters are started: about the time that they need to
start.
"""
START_COPIES_AFTER = 0.05
"""The same where workers can be forked."""
_PREFETCH = 2
"""Batches in flight per process."""
_MOST = 16
_READY = "ready"

T = TypeVar("T")


def processors() -> int:
    """CPUs that this process may use, at most 16, since one reader can't feed more workers."""
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return min(len(affinity(0)) if affinity is not None else os.cpu_count() or 1, _MOST)


def pack_batches(
    batches: Iterable[tuple[T, Sequence[Task]]],
    template: Template,
    options: Options,
    *,
    processes: int | None = 1,
    note: Callable[[str], None] | None = None,
) -> Iterator[tuple[T, Packed]]:
    """Render batches, in this process or in workers; yields each with its outcome, in order.

    The first item of a pair is passed through. `processes` is the number of workers: 1 for this
    process alone, None for one per CPU once the work takes longer than their start. While workers
    start, this process goes on rendering.

    Raises:
        RunError: a worker ended before its work was done.
    """
    encoder = Encoder(template)
    begun = time.monotonic()
    pool: _Pool | None = None
    waiting: deque[tuple[T, int]] = deque()
    count = processors() if processes is None else processes
    tell = note or _silent
    try:
        for passed, tasks in batches:
            if pool is None and count > 1 and (processes is not None or _late(begun)):
                pool = _Pool(count, template, options, encoder)
            if pool is not None and pool.failed is not None:
                tell(f"data: prepared in one process, because workers can't start: {pool.failed}")
                pool.stop()
                pool, count = None, 1
            if pool is None or not pool.ready:
                yield passed, pack_batch(tasks, template, encoder, options)
                continue
            if not waiting:
                tell(f"data: prepared in {count} processes")
            waiting.append((passed, pool.give(tasks)))
            if len(waiting) > _PREFETCH * count:
                passed, number = waiting.popleft()
                yield passed, pool.take(number)
        while waiting and pool is not None:
            passed, number = waiting.popleft()
            yield passed, pool.take(number)
    finally:
        if pool is not None:
            pool.stop()


def _late(begun: float) -> bool:
    spent = time.monotonic() - begun
    return spent > START_AFTER or (spent > START_COPIES_AFTER and may_fork())


def _silent(text: str) -> None:
    del text


class _Pool:
    """A pool of workers; batch n goes to worker n modulo their number, so results are read in
    order.
    """

    def __init__(self, count: int, template: Template, options: Options, encoder: Encoder) -> None:
        self._given = 0
        self._workers: list[_Worker] = []
        self.failed: str | None = None
        try:
            if may_fork():
                processes = _copies(count, template, options, encoder)
                self._workers = [_Worker(process) for process in processes]
                return
            setup = pickle.dumps((template, options))
            for _ in range(count):
                self._workers.append(_Worker(_interpreter(), setup))
        except Exception as error:
            # A user's own tokenizer may fail to pickle with any exception.
            self.failed = f"{type(error).__name__}: {error}"

    @property
    def ready(self) -> bool:
        """True once all workers have started; sets `failed` to the reason if one never will."""
        states = [worker.state() for worker in self._workers]
        self.failed = next((state for state in states if state not in (None, _READY)), self.failed)
        return self.failed is None and all(state == _READY for state in states)

    def give(self, tasks: Sequence[Task]) -> int:
        """Send a batch to its worker; returns the batch's number."""
        number = self._given
        self._given += 1
        self._workers[number % len(self._workers)].send(_dumped(tasks))
        return number

    def take(self, number: int) -> Packed:
        """The outcome of a batch; batches must be taken in order."""
        return self._workers[number % len(self._workers)].receive()

    def stop(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.stop()


def _copies(
    count: int, template: Template, options: Options, encoder: Encoder
) -> list[ForkedWorker]:
    """Forked workers, all made before the first thread that reads from one is started."""
    made: list[ForkedWorker] = []

    def serve(source: BinaryIO, out: BinaryIO) -> None:
        _answer(source, out, lambda: (template, options, encoder))

    for _ in range(count):
        made.append(fork(serve, others=[end for one in made for end in (one.stdin, one.stdout)]))
    return made


def _interpreter() -> subprocess.Popen[bytes]:
    code = f"import sys; sys.path[:] = {sys.path!r}; "
    code += "from tunesmith.data.preprocess.workers import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C reaches only the run, which then ends its workers
    )


class _Worker:
    def __init__(self, process: ForkedWorker | subprocess.Popen[bytes], setup: bytes | None = None):
        self._process = process
        self._state: str | None = None
        self._results: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True, name=HARMLESS).start()
        if setup is not None:
            # Sent by a thread, since the process reads it only after it has started and the pipe
            # may be full.
            sending = threading.Thread(target=self._send_setup, args=(setup,), daemon=True)
            sending.start()

    def state(self) -> str | None:
        """`ready`, the reason why it will not be, or None while it starts."""
        if self._state is None and not self._results.empty():
            kind, value = self._results.get()
            self._state = _READY if kind == _READY else str(value).strip().splitlines()[-1]
        return self._state

    def send(self, message: bytes) -> None:
        try:
            _write(self._process.stdin, message)
        except OSError:
            raise self._ended() from None

    def receive(self) -> Packed:
        kind, value = self._results.get()
        if kind == "done":
            return value
        if kind == "refused":
            raise value
        if kind == "ended":
            raise self._ended()
        raise RuntimeError(f"a process that prepares data failed:\n{value}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue  # unsent bytes no longer matter

    def _send_setup(self, setup: bytes) -> None:
        try:
            _write(self._process.stdin, setup)
        except (OSError, ValueError):
            return  # the process ended; the reader reports it

    def _read(self) -> None:
        try:
            while (message := _read(self._process.stdout)) is not None:
                self._results.put(pickle.loads(message))
        except (OSError, ValueError, EOFError):
            pass  # the pipe was closed; reported as the end below
        self._results.put(("ended", "it ended while it started"))

    def _ended(self) -> RunError:
        code = self._process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return RunError(
            f"a process that prepares data ended {how} before its work was done",
            hint="if memory ran out, device.num_proc=1 uses one process and less of it",
        )


def serve() -> None:
    """Worker process: render batches from standard input until it ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not mix with the results
    source = sys.stdin.buffer

    def begin() -> tuple[Template, Options, Encoder]:
        template, options = pickle.loads(_read(source) or b"")
        return template, options, Encoder(template)

    _answer(source, out, begin)


def _answer(
    source: BinaryIO, out: BinaryIO, begin: Callable[[], tuple[Template, Options, Encoder]]
) -> None:
    try:
        template, options, encoder = begin()
        _write(out, pickle.dumps((_READY, None)))
        while (message := _read(source)) is not None:
            packed = pack_batch(_loaded(message), template, encoder, options)
            _write(out, pickle.dumps(("done", packed), protocol=5))
    except BrokenPipeError:
        return  # the run has ended
    except TunesmithError as error:
        _write(out, pickle.dumps(("refused", error)))
    except Exception:
        _write(out, pickle.dumps(("failed", traceback.format_exc())))


def _dumped(tasks: Sequence[Task]) -> bytes:
    """Tasks pickled as plain tuples, which takes a third of the time."""
    plain = [(*one[1:], one.origin.source, one.origin.row) for one in tasks]
    return pickle.dumps(plain, protocol=5)


def _loaded(message: bytes) -> list[Task]:
    return [Task(Origin(source, row), *rest) for *rest, source, row in pickle.loads(message)]


def _write(pipe: BinaryIO | Any, message: bytes) -> None:
    pipe.write(len(message).to_bytes(8, "little"))
    pipe.write(message)
    pipe.flush()


def _read(pipe: BinaryIO | Any) -> bytes | None:
    """The next message; None at the end of the pipe."""
    size = pipe.read(8)
    if len(size) < 8:
        return None
    length = int.from_bytes(size, "little")
    message = pipe.read(length)
    return message if len(message) == length else None
