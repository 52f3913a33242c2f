"""Compare two checkouts to the bit: the same recipes give the same losses and the same weights.

python benchmarks/same_bits.py BEFORE AFTER [--only NAME] [--keep FOLDER]

Each recipe of `CASES` is run by both checkouts, in float32 on one thread. Compared are all numbers
of the training and evaluation records of `metrics.jsonl` but those of the clock and the memory, the
losses in `rows.parquet`, and the bytes of the files of weights. Then a copy of BEFORE's run is cut
back to a checkpoint in its midst, AFTER resumes it, and the result is held against BEFORE's. One
more run is ended by SIGTERM and resumed, by its own checkout and by the other.

Where a key of the recipe has been renamed, each checkout is given the name that its schema knows.

Importing torch and transformers takes far longer than one of these runs. One process for each
checkout therefore imports them once and forks a process for each command line. The case "two ranks"
is started as a user does it, by `python -m tunesmith train device.ranks=2`.

Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

HERE = Path(__file__).resolve()
STEPS, MIDDLE = 6, 3
LONG = 60  # steps of the run that a signal ends, so that the signal comes before its end
COMMON = (
    "model.dtype=float32", "batch.documents=4", "optim.lr=0.003", "optim.weight_decay=0.1",
    "device.threads=1", "device.prepare_processes=1", "checkpoint.keep=9",
)  # fmt: skip
RENAMED = {
    "device.context": "device.context_parallel",
    "device.tensor": "device.tensor_parallel",
    "device.prepare_processes": "device.num_proc",
}
RENAMED_VALUES = {("device.attention", "isolated"): "unpacked"}
CLOCK_AND_MEMORY = ("seconds", "tokens_per_second", "peak_memory")
INPUTS = """
import sys
from pathlib import Path
from tiny import chat_rows, tiny_folder, write_jsonl
folder = Path(sys.argv[1])
tiny_folder(folder / "model", num_hidden_layers=2)
write_jsonl(folder / "rows.jsonl", chat_rows(22))
write_jsonl(folder / "eval.jsonl", chat_rows(25)[22:])
"""


@dataclass(frozen=True)
class Case:
    """A way to train."""

    name: str
    options: tuple[str, ...] = ()
    ranks: int = 1
    launched_by_us: bool = False  # by `device.ranks`, else as torchrun starts ranks


CASES = [
    Case("full"),
    Case("LoRA", ("adapter=lora", "adapter.rank=4", "adapter.dropout=0.1")),
    Case("packed", ("batch.packing=bfd", "batch.pack_tokens=160", "device.micro_tokens=96")),
    Case("unpacked", ("device.attention=isolated",)),
    Case("two ranks", ("device.ranks=2",), ranks=2, launched_by_us=True),
    Case("two ranks, sharded", ("device.shard=full",), ranks=2),
    Case("two ranks, context parallel", ("device.context=2",), ranks=2),
    Case("two ranks, tensor parallel", ("device.tensor=2",), ranks=2),
]
ENDED = "ended by SIGTERM"


class Checkout:
    """A source tree, and the process with its package imported that forks its commands."""

    def __init__(self, path: Path, inputs: Path, place: Path) -> None:
        self.path, self.inputs, self.place = path.resolve(), inputs, place
        place.mkdir()
        self.log = place / "log.txt"
        self.environment = {
            **os.environ, "PYTHONPATH": str(self.path / "src"), "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "TUNESMITH_CACHE": str(place / "cache"),
        }  # fmt: skip
        self._server = subprocess.Popen(
            [sys.executable, str(HERE), "--serve", str(self.path)],
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

    def arguments(self, case: Case, out: Path, *, steps: int) -> list[str]:
        every = [f"train.steps={steps}", f"checkpoint.every={MIDDLE}", f"eval.every={MIDDLE}"]
        options = [self.named(option) for option in (*COMMON, *every, *case.options)]
        return [
            "train", "--model", str(self.inputs / "model"),
            "--data", str(self.inputs / "rows.jsonl"), "--eval", str(self.inputs / "eval.jsonl"),
            "--out", str(out), *options,
        ]  # fmt: skip

    def train(self, case: Case, *, steps: int = STEPS) -> Path:
        out = self.place / case.name.replace(" ", "-").replace(",", "")
        arguments = self.arguments(case, out, steps=steps)
        if case.launched_by_us:
            self._command(arguments)
        else:
            self._on_ranks(arguments, case.ranks)
        return out

    def resume(self, case: Case, run: Path) -> Path:
        if case.launched_by_us:
            self._command(["resume", str(run)])
        else:
            self._on_ranks(["resume", str(run)], case.ranks)
        return run

    def train_until_signal(self, case: Case, out: Path) -> Path:
        """A run that SIGTERM ends after a few steps; it saves and exits with 143."""
        process = self.start(self.arguments(case, out, steps=LONG))
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"train"') < MIDDLE + 1:
            if (out / "model").exists():
                break
            time.sleep(0.002)
        os.kill(process, signal.SIGTERM)
        self.wait(process, wanted=143)
        return out

    def _on_ranks(self, arguments: Sequence[str], ranks: int) -> None:
        if ranks == 1:
            return self.wait(self.start(arguments))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        together = {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        numbers = [
            self.start(arguments, rank={**together, "RANK": str(n), "LOCAL_RANK": str(n)})
            for n in range(ranks)
        ]
        for number in numbers:
            self.wait(number)

    def _command(self, arguments: Sequence[str]) -> None:
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


def cut_back(run: Path, to: Path) -> Path:
    """A copy of the run as a kill after step `MIDDLE` would have left it, with later records."""
    shutil.copytree(run, to)
    for later in (to / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > MIDDLE:
            shutil.rmtree(later)
    shutil.rmtree(to / "model")
    return to


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [
        {key: value for key, value in record.items() if key not in CLOCK_AND_MEMORY}
        for record in found
        if record["kind"] in ("train", "eval")
    ]


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}


def differences(one: Path, other: Path) -> Iterator[str]:
    """What differs between two runs, in a few words each."""
    for mine, yours in zip_longest(records(one), records(other), fillvalue={}):
        for key in sorted({*mine, *yours}):
            if mine.get(key) != yours.get(key):
                at = f"{mine.get('kind')} {mine.get('step')}"
                yield f"{at}: {key} {mine.get(key)} / {yours.get(key)}"
    if not pq.read_table(one / "rows.parquet").equals(pq.read_table(other / "rows.parquet")):
        yield "rows.parquet"
    mine, yours = weights(one), weights(other)
    if not mine:
        yield "no weights"
    for name in sorted({*mine, *yours}):
        if mine.get(name) != yours.get(name):
            yield name


class Table:
    """Prints a line for each comparison and remembers whether all were equal."""

    def __init__(self) -> None:
        self.equal = True
        print("| case | compared | records | weights | |\n|---|---|---|---|---|", flush=True)

    def line(self, case: Case | str, what: str, one: Path, other: Path) -> None:
        found = list(differences(one, other))
        self.equal = self.equal and not found
        name = case if isinstance(case, str) else case.name
        files = ", ".join(weights(one))
        verdict = f"**{len(found)} differences**: {'; '.join(found[:4])}" if found else "equal"
        print(f"| {name} | {what} | {len(records(one))} | {files} | {verdict} |", flush=True)


def compare_case(case: Case, before: Checkout, after: Checkout, table: Table) -> None:
    old, new = before.train(case), after.train(case)
    table.line(case, "before, after", old, new)
    copy = cut_back(old, after.place / f"{new.name}-resumed")
    table.line(case, "before, resumed by after", old, after.resume(case, copy))


def compare_ended(before: Checkout, after: Checkout, table: Table) -> None:
    """A signal ends a run with keys that have been renamed; both resume it."""
    case = Case(ENDED, ("device.attention=isolated", "device.context=1", "device.tensor=1"))
    whole = before.train(case, steps=LONG)
    old = before.train_until_signal(case, before.place / "ended")
    copy = after.place / "ended-by-before"
    shutil.copytree(old, copy)
    table.line(case, "before, resumed by before", whole, before.resume(case, old))
    table.line(case, "before, resumed by after", whole, after.resume(case, copy))
    new = after.train_until_signal(case, after.place / "ended")
    table.line(case, "before, after resumed by after", whole, after.resume(case, new))


def compare(before: Path, after: Path, folder: Path, only: str | None) -> bool:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "tests")}
    subprocess.run(
        [sys.executable, "-c", INPUTS, str(folder)], env=environment,
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    trees = [Checkout(before, folder, folder / "before"), Checkout(after, folder, folder / "after")]
    table = Table()
    for case in CASES:
        if only in (None, case.name):
            compare_case(case, trees[0], trees[1], table)
    if only in (None, ENDED):
        compare_ended(trees[0], trees[1], table)
    for tree in trees:
        tree.close()
    return table.equal


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="folder of a checkout")
    parser.add_argument("after", type=Path, help="folder of another one")
    names = [*(case.name for case in CASES), ENDED]
    parser.add_argument("--only", choices=names, help="this case alone")
    parser.add_argument("--keep", type=Path, help="a new folder in which the runs stay")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True)
        return 0 if compare(options.before, options.after, options.keep, options.only) else 1
    with tempfile.TemporaryDirectory() as folder:
        equal = compare(options.before, options.after, Path(folder), options.only)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
