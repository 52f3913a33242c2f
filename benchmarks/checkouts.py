"""A checkout of Tunesmith: a process that has it imported and forks one for each command line.

Importing torch and transformers takes far longer than a run of a tiny model, so it is done once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RENAMED = {
    "device.context": "device.context_parallel",
    "device.tensor": "device.tensor_parallel",
    "device.prepare_processes": "device.num_proc",
}
"""Keys of the recipe, and their names in newer checkouts."""

RENAMED_VALUES = {("device.attention", "isolated"): "unpacked"}


class Checkout:
    """A source tree, and the process that forks its commands."""

    def __init__(self, path: Path, place: Path) -> None:
        self.path, self.place = path.resolve(), place
        place.mkdir()
        self.log = place / "log.txt"
        self.environment = {
            **os.environ, "PYTHONPATH": str(self.path / "src"), "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "TUNESMITH_CACHE": str(place / "cache"),
        }  # fmt: skip
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("a"), text=True,
            env=self.environment,
        )  # fmt: skip
        self.wait(self.start(["schema"], log=place / "schema.json"))
        self._schema = json.loads((place / "schema.json").read_text())

    def ask(self, task: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise SystemExit(f"error: {self.path}\n{self.log.read_text()[-3000:]}")
        return int(answer)

    def start(self, arguments: Sequence[str], *, rank: dict[str, str] | None = None, **where: Path):
        """The number of the process that runs `tunesmith ARGUMENTS...`."""
        log = str(where.get("log", self.log))
        return self.ask({"arguments": list(arguments), "environment": rank or {}, "log": log})

    def wait(self, process: int, *, wanted: int = 0) -> None:
        code = self.ask({"wait": process})
        if code != wanted:
            said = self.log.read_text()[-3000:] if self.log.exists() else ""
            raise SystemExit(f"error: {self.path}: exit code {code}, not {wanted}\n{said}")

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def named(self, option: str) -> str:
        """The option with the names that this checkout's schema has."""
        key, _, value = option.partition("=")
        field = self._field(key)
        if field is None and key in RENAMED:
            key = RENAMED[key]
            field = self._field(key)
        if (key, value) in RENAMED_VALUES and f'"{value}"' not in json.dumps(field):
            value = RENAMED_VALUES[key, value]
        return f"{key}={value}"

    def _field(self, key: str) -> Any:
        section, _, name = key.partition(".")
        found = self._schema["properties"][section]
        text = json.dumps(found)
        for definition, schema in self._schema.get("$defs", {}).items():
            if f'"#/$defs/{definition}"' in text and name in schema.get("properties", {}):
                return schema["properties"][name]
        return found.get("properties", {}).get(name)

    def run(self, arguments: Sequence[str], *, ranks: int = 1) -> None:
        """Run `tunesmith ARGUMENTS...` on so many ranks, started as torchrun starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        together = {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        numbers = [
            self.start(arguments, rank={**together, "RANK": str(n), "LOCAL_RANK": str(n)})
            if ranks > 1
            else self.start(arguments)
            for n in range(ranks)
        ]
        for number in numbers:
            self.wait(number)

    def run_command(self, arguments: Sequence[str]) -> None:
        """The same as a user starts it, in a new interpreter."""
        done = subprocess.run(
            [sys.executable, "-m", "tunesmith", *arguments],
            env=self.environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"error: {self.path}: {' '.join(arguments)}\n{done.stderr[-3000:]}")


def serve(checkout: Path) -> None:
    """Import everything once, then fork a process for each command line on standard input."""
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import tunesmith
    from tunesmith.__main__ import main as command

    if checkout.resolve() not in Path(tunesmith.__file__).resolve().parents:
        raise SystemExit(f"error: {tunesmith.__file__} is not of {checkout}")
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            answer = os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1])
        else:
            answer = os.fork() or _act(task, command)
        print(answer, flush=True)


def _act(task: dict[str, Any], command: Any) -> int:
    """The forked process: one command line; never returns."""
    os.environ.update(task["environment"])
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["tunesmith", *task["arguments"]]
    code: Any = 1
    try:
        command(task["arguments"])
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
