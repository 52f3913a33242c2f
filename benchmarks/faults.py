"""Kill runs at random moments, go on with each to its end, and compare with undisturbed ones.

python benchmarks/faults.py [--kills 200] [--seed 0] [--results benchmarks/results/faults.md]

Each attempt is a process of its own that a SIGKILL ends: at any moment from its first instruction
to its last, or while a checkpoint is half-written. It is the command of preemptible machines,
`tunesmith train ... --out RUN --resume`, given again and again. To spare a start-up of seconds an
attempt, one interpreter that has imported everything forks them.

Exit code 1 if a run differs from the undisturbed one: in a byte of its weights, in a record of a
step or an evaluation, or in a row that was learned from more or less often.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]

from fault_runs import records  # noqa: E402
from forked import Running, Server  # noqa: E402

from tiny import chat_rows, tiny_folder, write_jsonl  # noqa: E402

ROWS, EPOCHS = 22, 6
COMMON = [
    "batch.documents=4", f"train.epochs={EPOCHS}", "checkpoint.every=1", "eval.every=2",
    "device.threads=1", "optim.lr=0.01",
]  # fmt: skip
KINDS = {
    "full": [],
    "full, bfloat16, best kept": ["model.dtype=bfloat16", "train.result=best"],
    "LoRA with dropout": ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2"],
    "psft with noise": ["objective=psft", "objective.outer_steps=3", "objective.neftune=1"],
}
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")


@dataclass
class Found:
    """What came of all runs."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    runs: collections.Counter[str] = field(default_factory=collections.Counter)
    half_written: int = 0  # kills that left a checkpoint begun
    other_weights: int = 0
    other_records: int = 0
    lost_rows: int = 0
    repeated_rows: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        wrong = self.other_weights, self.other_records, self.lost_rows, self.repeated_rows
        return not any(wrong) and not self.failed


@dataclass(frozen=True)
class Case:
    """A way to train, and its undisturbed run."""

    kind: str
    server: Server
    folder: Path
    seconds: float  # that the undisturbed run took

    @property
    def wanted(self) -> Path:
        return self.folder / f"wanted-{self.kind}"

    def start(self, out: Path) -> Running:
        return start(self.server, self.folder, out, self.kind)


def start(server: Server, folder: Path, out: Path, kind: str) -> Running:
    return server.start(
        [
            "train", "--model", folder / "model", "--data", folder / "rows.jsonl",
            "--eval", folder / "eval.jsonl", "--out", out, "--resume", *COMMON, *KINDS[kind],
        ]
    )  # fmt: skip


def make_case(kind: str, server: Server, folder: Path) -> Case:
    begun = time.monotonic()
    done = start(server, folder, folder / f"wanted-{kind}", kind)
    assert done.wait() == 0, done.said
    return Case(kind, server, folder, time.monotonic() - begun)


def half_written(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.tmp"))


def kill_once(case: Case, run: Path, choice: random.Random, found: Found) -> bool:
    """An attempt that is killed; False if it came to its end before."""
    inside = choice.random() < 0.4
    running = case.start(run)
    if inside:
        passed = choice.randrange(1, 9)  # saves that are let be
        while passed and not running.ended():
            while not half_written(run) and not running.ended():
                time.sleep(0.0005)
            passed -= 1
            while passed and half_written(run) and not running.ended():
                time.sleep(0.0005)
        time.sleep(choice.uniform(0, 0.006))
    else:
        time.sleep(choice.uniform(0, case.seconds / 2))
    if not running.ended():
        running.kill()
    code = running.wait()
    if code != -9:
        if code != 0:
            found.failed.append(running.said)
        return False
    found.half_written += half_written(run)
    found.kills["inside a save" if inside else "at any moment"] += 1
    return True


def compare(case: Case, run: Path, found: Found) -> None:
    found.runs[case.kind] += 1
    names = [name for name in WEIGHTS if (case.wanted / "model" / name).is_file()]
    same = [
        (run / "model" / name).read_bytes() == (case.wanted / "model" / name).read_bytes()
        for name in names
    ]
    found.other_weights += not (same and all(same))
    for kind in ("train", "eval"):
        found.other_records += records(run, kind) != records(case.wanted, kind)
    seen = collections.Counter(
        (row["source"], row["row"], row["epoch"])
        for row in pq.read_table(run / "rows.parquet").to_pylist()
    )
    source = next(iter(seen))[0]
    wanted = [(source, row, epoch) for row in range(ROWS) for epoch in range(1, EPOCHS + 1)]
    found.lost_rows += sum(seen[key] == 0 for key in wanted)
    found.repeated_rows += sum(max(0, count - 1) for count in seen.values())


def go(folder: Path, *, kills: int, seed: int) -> Found:
    tiny_folder(folder / "model", num_hidden_layers=2)
    write_jsonl(folder / "rows.jsonl", chat_rows(ROWS))
    write_jsonl(folder / "eval.jsonl", chat_rows(ROWS + 3)[ROWS:])
    os.environ["TUNESMITH_CACHE"] = str(folder / "cache")
    server, choice, found = Server(folder), random.Random(seed), Found()
    cases = [make_case(kind, server, folder) for kind in KINDS]
    number = 0
    while found.kills.total() < kills and not found.failed:
        case, run = cases[number % len(cases)], folder / f"run-{number}"
        number += 1
        for _ in range(choice.randint(6, 14)):
            if not kill_once(case, run, choice, found):
                break
        last = case.start(run)
        if last.wait() != 0:
            found.failed.append(last.said)
            break
        compare(case, run, found)
        print(f"{found.kills.total()} kills, {number} runs, clean: {found.clean}", flush=True)
    server.close()
    return found


def report(found: Found, seed: int) -> str:
    lines = [
        "# Kills",
        "",
        "Written by `make test-faults`: `benchmarks/faults.py` says what is done. "
        f"Seed {seed}, {platform.system()}, Python {platform.python_version()}.",
        "",
        "| | |",
        "|---|---|",
        f"| processes killed by SIGKILL | {found.kills.total()} |",
        *(f"| … {kind} | {count} |" for kind, count in sorted(found.kills.items())),
        f"| … which left a checkpoint half-written | {found.half_written} |",
        f"| runs, each gone on with to its end | {found.runs.total()} |",
        *(f"| … {kind} | {count} |" for kind, count in found.runs.items()),
        f"| runs whose weights differ from the undisturbed run's | {found.other_weights} |",
        f"| runs whose steps or evaluations have other records | {found.other_records} |",
        f"| rows lost | {found.lost_rows} |",
        f"| rows repeated | {found.repeated_rows} |",
        f"| attempts that ended in an error | {len(found.failed)} |",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs and compare.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = go(Path(folder), kills=options.kills, seed=options.seed)
    text = report(found, options.seed)
    print(text)
    for said in found.failed:
        print(said, file=sys.stderr)
    if options.results is not None and found.clean:
        options.results.write_text(text, encoding="utf-8")
    return 0 if found.clean else 1


if __name__ == "__main__":
    sys.exit(main())
