"""A long run of a tiny model: does memory grow, do file handles stay open?

python benchmarks/soak.py [--steps 50000] [--seconds N] [--results benchmarks/results/soak.md]

One run with everything on that repeats: steps, evaluations with samples, checkpoints that replace
each other, metrics. From outside, the process's resident memory, open files and threads are read
from /proc while it goes; the slope is a least-squares line over the second half, so that filling
caches at the start does not count. Losses of every row in every epoch are kept until the end, by
design, and once more in the copy from which a checkpoint is written beside the steps: their size is
computed and shown beside. With `--seconds` the run is ended by SIGTERM after that time, and the
report is of the steps that were done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS)]

from tiny import chat_rows, tiny_folder, write_jsonl  # noqa: E402

DOCUMENTS = 4
BYTES_A_DOCUMENT = 4 + 8 + 8 + 8  # step, number, loss and weight
BY_DESIGN = 2 * DOCUMENTS * BYTES_A_DOCUMENT  # bytes a step
GROWTH_A_STEP = 256.0
"""Bytes a step, beyond these, that count as growth."""


@dataclass
class Seen:
    """What a process held when its metrics file had so many steps."""

    step: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def slope(self) -> float:
        """Bytes a step over the second half."""
        step, memory = np.asarray(self.step, float), np.asarray(self.memory, float)
        late = step >= step[-1] / 2
        return float(np.polyfit(step[late], memory[late], 1)[0])

    def look(self, process: int, step: int) -> None:
        place = Path("/proc") / str(process)
        status = dict(
            line.split(":", 1)
            for line in (place / "status").read_text().splitlines()
            if ":" in line
        )
        files = len(os.listdir(place / "fd"))
        self.step.append(step)
        self.memory.append(int(status["VmRSS"].split()[0]) * 1024)
        self.files.append(files)
        self.threads.append(int(status["Threads"]))


def command(folder: Path, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "tunesmith", "train", "--model", str(folder / "model"),
        "--data", str(folder / "rows.jsonl"), "--eval", str(folder / "eval.jsonl"),
        "--out", str(folder / "run"),
        f"batch.documents={DOCUMENTS}", f"train.steps={steps}", "device.threads=1",
        "checkpoint.every=250", "eval.every=500", "eval.samples=1", "eval.max_new_tokens=4",
    ]  # fmt: skip


def steps_done(metrics: Path, seen: int, offset: int) -> tuple[int, int]:
    """The newest step in the file, read from `offset` on."""
    if not metrics.exists():
        return seen, offset
    with open(metrics, "rb") as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    for line in whole.splitlines():
        record = json.loads(line)
        seen = record["step"] if record["kind"] == "train" else seen
    return seen, offset + len(whole)


def go(folder: Path, steps: int, seconds: float) -> Seen:
    tiny_folder(folder / "model", num_hidden_layers=1, hidden_size=32, head_dim=8)
    write_jsonl(folder / "rows.jsonl", chat_rows(64))
    write_jsonl(folder / "eval.jsonl", chat_rows(67)[64:])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TUNESMITH_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    log = open(folder / "log", "wb")  # noqa: SIM115 - the process writes it to its end
    process = subprocess.Popen(
        command(folder, steps), stdout=log, stderr=subprocess.STDOUT, env=environment
    )
    found, step, offset, due = Seen(), 0, 0, 0
    deadline = time.monotonic() + seconds
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None:
        step, offset = steps_done(metrics, step, offset)
        if step > due and step < steps:
            try:
                found.look(process.pid, step)
            except (OSError, KeyError):  # it has just ended
                break
            due = step + max(1, steps // 200)
        if time.monotonic() > deadline:
            process.terminate()
            break
        time.sleep(0.05)
    if process.wait() not in (0, 143):
        raise SystemExit((folder / "log").read_text())
    return found


def report(found: Seen) -> str:
    slope = found.slope()
    shown = np.linspace(0, len(found.step) - 1, 11).astype(int)
    lines = [
        "# A long run",
        "",
        f"Written by `benchmarks/soak.py`: {found.step[-1]:,} steps of a tiny model in one "
        "process, a checkpoint every 250 steps, an evaluation with a generated sample every 500. "
        f"{platform.system()}, Python {platform.python_version()}.",
        "",
        f"- Memory grows by **{slope:.0f} bytes a step** in the second half, of which the losses "
        f"of the rows, kept until the end by design, and their copy are {BY_DESIGN}.",
        f"- Open files: {min(found.files)} to {max(found.files)}, at the first look "
        f"{found.files[0]}, at the last {found.files[-1]}.",
        f"- Threads: {min(found.threads)} to {max(found.threads)}.",
        "",
        "| step | resident memory, MiB | open files | threads |",
        "|---|---|---|---|",
        *(
            f"| {found.step[i]:,} | {found.memory[i] / 2**20:.1f} | {found.files[i]} | "
            f"{found.threads[i]} |"
            for i in shown
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Watch a long run.")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = go(Path(folder), options.steps, options.seconds)
    text = report(found)
    print(text)
    if options.results is not None:
        options.results.write_text(text, encoding="utf-8")
    extra = found.slope() - BY_DESIGN
    leaks = extra > GROWTH_A_STEP or found.files[-1] > found.files[len(found.files) // 2] + 2
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
