"""What the tests of faults share: command lines of small runs, and what they leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from forked import Running, Server

OPTIONS = [
    "batch.documents=4",
    "train.epochs=2",
    "checkpoint.every=1",
    "checkpoint.keep=3",
    "eval.every=2",
    "device.threads=1",
    "optim.lr=0.01",
    "model.dtype=float32",
]
KILL_AFTER = """
import os, signal
from tunesmith.train.trainer import Trainer
save = Trainer.save
def saved(self):
    save(self)
    if self.step == {step}:
        self._wait_for_writer()
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.save = saved
"""
UNLIKE = ("seconds", "tokens_per_second", "peak_memory")


@dataclass
class Place:
    """A model, its rows, and the processes that train on them."""

    folder: Path
    server: Server

    def arguments(
        self, out: Path, options: Sequence[str] = (), *, rows: Path | None = None
    ) -> list[str]:
        """Of a run that starts, or goes on, in `out`."""
        return [
            "train", "--model", str(self.folder / "model"),
            "--data", str(rows or self.folder / "rows.jsonl"),
            "--eval", str(self.folder / "eval.jsonl"),
            "--out", str(out), "--resume", *OPTIONS, *options,
        ]  # fmt: skip

    def start(self, out: Path, options: Sequence[str] = (), *, prelude: str = "") -> Running:
        return self.server.start(self.arguments(out, options), prelude=prelude)

    def run(self, out: Path, options: Sequence[str] = (), *, prelude: str = "") -> Running:
        return self.server.run(self.arguments(out, options), prelude=prelude)

    def killed_after(self, out: Path, step: int, options: Sequence[str] = ()) -> Path:
        """A run that was killed once this step was saved."""
        done = self.run(out, options, prelude=KILL_AFTER.format(step=step))
        assert done.code == -9, done.said
        return out

    def resume(self, out: Path, options: Sequence[str] = (), *, prelude: str = "") -> Running:
        return self.server.run(["resume", str(out), *options], prelude=prelude)


def records(run: Path, kind: str) -> list[dict]:
    """Of metrics.jsonl, without what differs from run to run."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [record for line in lines if (record := json.loads(line))["kind"] == kind]
    return [{k: v for k, v in record.items() if k not in UNLIKE} for record in found]


def events(run: Path, name: str) -> list[dict]:
    return [record for record in records(run, "event") if record["event"] == name]


def assert_same_run(run: Path, wanted: Path) -> None:
    """Weights, losses of steps and rows, and evaluations are the same to the bit."""
    name = "model/model.safetensors"
    assert (run / name).read_bytes() == (wanted / name).read_bytes()
    for kind in ("train", "eval"):
        assert records(run, kind) == records(wanted, kind)
    assert pq.read_table(run / "rows.parquet").equals(pq.read_table(wanted / "rows.parquet"))


def assert_clean(done: Running, *, code: int) -> None:
    """An error as users see it: the code, a hint, and no traceback."""
    assert done.wait() == code, done.said
    assert "Traceback" not in done.said
    assert "error: " in done.said
    assert "hint: " in done.said, done.said
