"""Real processes without their start-up: one interpreter imports everything once and forks a
process for each command line, which may be killed, limited and starved as any other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import json, os, resource, sys, traceback
import torch
import transformers, peft, pyarrow.parquet, numpy
import tunesmith.run, tunesmith.run.result, tunesmith.build.build, tunesmith.train.trainer
import tunesmith.run.resume_checks
from tunesmith.cli.app import run

def act(task):
    for number, path in ((1, task["stdout"]), (2, task["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    sys.argv = ["tunesmith", *task["arguments"]]
    code = 1
    try:
        exec(task["prelude"], {"__name__": "prelude"})
        code = run(task["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)

print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    if "wait" in task:
        print(os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        act(task)
    print(child, flush=True)
"""


@dataclass
class Running:
    """A process on its way."""

    server: Server
    pid: int
    out: Path
    err: Path
    code: int | None = None

    def wait(self) -> int:
        """Its exit code; minus the signal that ended it."""
        if self.code is None:
            self.code = int(self.server.ask({"wait": self.pid}))
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def ended(self) -> bool:
        """True once it is gone or a zombie."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
        return stat.rpartition(")")[2].split()[0] == "Z"

    def until(self, true: Callable[[], bool], *, seconds: float = 120) -> None:
        """Wait for something that it does."""
        deadline = time.monotonic() + seconds
        while not true():
            assert not self.ended() or true(), self.said
            assert time.monotonic() < deadline, "it never came to that"
            time.sleep(0.01)

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return self.err.read_text(errors="replace")


class Server:
    """The interpreter that forks."""

    def __init__(self, place: Path, environment: Mapping[str, str] | None = None) -> None:
        self.place = place
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        assert self._read() == "ready"

    def ask(self, task: Mapping[str, object]) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forking process ended"
        return line.strip()

    def start(self, arguments: Sequence[object], *, prelude: str = "") -> Running:
        """Start `tunesmith ARGUMENTS...`, after running `prelude` in its process."""
        self._count += 1
        out, err = (self.place / f"{self._count}.{name}" for name in ("out", "err"))
        err.touch()
        task = {
            "arguments": [str(argument) for argument in arguments],
            "prelude": prelude,
            "stdout": str(out),
            "stderr": str(err),
        }
        return Running(self, int(self.ask(task)), out, err)

    def run(self, arguments: Sequence[object], *, prelude: str = "") -> Running:
        """The same, and wait for its end."""
        running = self.start(arguments, prelude=prelude)
        running.wait()
        return running

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
