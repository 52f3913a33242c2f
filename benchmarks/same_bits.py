"""Compare two checkouts to the bit: the same recipes give the same losses and the same weights.

python benchmarks/same_bits.py BEFORE AFTER [--only NAME] [--keep FOLDER]

Each recipe of `CASES` is run by both checkouts, in float32 on one thread. Compared are all numbers
of the training and evaluation records of `metrics.jsonl` but those of the clock and the memory, the
losses in `rows.parquet`, and the bytes of the files of weights. Then a copy of BEFORE's run is cut
back to a checkpoint in its midst, AFTER resumes it, and the result is held against BEFORE's. One
more run is ended by SIGTERM and resumed, by its own checkout and by the other.

Where a key of the recipe has been renamed, each checkout is given the name that its schema knows.

One process for each checkout forks its command lines (`checkouts.py`). Only the case "two ranks" is
started as a user does it, by `python -m tunesmith train device.ranks=2`.

Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from checkouts import Checkout

TESTS = Path(__file__).resolve().parents[1] / "tests"
STEPS, MIDDLE = 6, 3
LONG = 60  # steps of the run that a signal ends, so that the signal comes before its end
COMMON = (
    "model.dtype=float32", "batch.documents=4", "optim.lr=0.003", "optim.weight_decay=0.1",
    "device.threads=1", "device.prepare_processes=1", "checkpoint.keep=9",
)  # fmt: skip
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


class Runs:
    """The runs of one checkout."""

    def __init__(self, checkout: Path, inputs: Path, place: Path) -> None:
        self.checkout, self.inputs, self.place = Checkout(checkout, place), inputs, place

    def arguments(self, case: Case, out: Path, *, steps: int) -> list[str]:
        every = [f"train.steps={steps}", f"checkpoint.every={MIDDLE}", f"eval.every={MIDDLE}"]
        options = [self.checkout.named(option) for option in (*COMMON, *every, *case.options)]
        return [
            "train", "--model", str(self.inputs / "model"),
            "--data", str(self.inputs / "rows.jsonl"), "--eval", str(self.inputs / "eval.jsonl"),
            "--out", str(out), *options,
        ]  # fmt: skip

    def train(self, case: Case, *, steps: int = STEPS) -> Path:
        out = self.place / case.name.replace(" ", "-").replace(",", "")
        arguments = self.arguments(case, out, steps=steps)
        if case.launched_by_us:
            self.checkout.run_command(arguments)
        else:
            self.checkout.run(arguments, ranks=case.ranks)
        return out

    def resume(self, case: Case, run: Path) -> Path:
        if case.launched_by_us:
            self.checkout.run_command(["resume", str(run)])
        else:
            self.checkout.run(["resume", str(run)], ranks=case.ranks)
        return run

    def train_until_signal(self, case: Case, out: Path) -> Path:
        """A run that SIGTERM ends after a few steps; it saves and exits with 143."""
        process = self.checkout.start(self.arguments(case, out, steps=LONG))
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"train"') < MIDDLE + 1:
            if (out / "model").exists():
                break
            time.sleep(0.002)
        os.kill(process, signal.SIGTERM)
        self.checkout.wait(process, wanted=143)
        return out


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


def compare_case(case: Case, before: Runs, after: Runs, table: Table) -> None:
    old, new = before.train(case), after.train(case)
    table.line(case, "before, after", old, new)
    copy = cut_back(old, after.place / f"{new.name}-resumed")
    table.line(case, "before, resumed by after", old, after.resume(case, copy))


def compare_ended(before: Runs, after: Runs, table: Table) -> None:
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
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    subprocess.run(
        [sys.executable, "-c", INPUTS, str(folder)], env=environment,
        check=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    trees = [Runs(before, folder, folder / "before"), Runs(after, folder, folder / "after")]
    table = Table()
    for case in CASES:
        if only in (None, case.name):
            compare_case(case, trees[0], trees[1], table)
    if only in (None, ENDED):
        compare_ended(trees[0], trees[1], table)
    for tree in trees:
        tree.checkout.close()
    return table.equal


def main() -> int:
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
