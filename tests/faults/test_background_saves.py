"""A process that dies while a checkpoint is written beside its steps."""

from __future__ import annotations

from pathlib import Path

from fault_runs import Place, assert_same_run

HELD = """
import os, signal, threading
from tunesmith.train.trainer import Trainer
fsync, save, learn = os.fsync, Trainer.save, Trainer._learn
stuck = threading.Event()

def held(descriptor):
    if stuck.is_set() and threading.current_thread().name == "checkpoint":
        threading.Event().wait()
    fsync(descriptor)

def saved(self):
    self._wait_for_writer()
    if self.step == 4:
        stuck.set()
    save(self)

def killed(self, number, lr):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(self, number, lr)

os.fsync, Trainer.save, Trainer._learn = held, saved, killed
"""


def test_killed_while_steps_go_on_beside_a_save(
    place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = place.run(run, ["checkpoint.every=2"], prelude=HELD)
    assert done.code == -9, done.said
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-2", "step-4.tmp"]
    assert '"step": 5' in (run / "metrics.jsonl").read_text()  # steps went on beside it
    again = place.resume(run)
    assert again.code == 0, again.said
    assert "from step 2, exact to the bit" in again.said
    assert_same_run(run, undisturbed)
