"""Signals with a deadline behind them: a SIGKILL follows 30 seconds after SIGTERM."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest
from fault_runs import Place, assert_same_run, records
from forked import Running

NOISY = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2", "device.micro_tokens=120"]
SLOW = """
import pathlib, time
from tunesmith.train import triggers
from tunesmith.train.trainer import Trainer
triggers.FINISH_SECONDS = 0.0  # as if each micro-batch took seconds
between = Trainer._between
def slow(self):
    between(self)
    if {when}:
        pathlib.Path({marker!r}).touch()
        time.sleep(0.4)
Trainer._between = slow
"""


def terminated(running: Running, marker: Path) -> None:
    """SIGTERM once the marker is there, and SIGKILL when the grace is over, as schedulers do."""
    running.until(marker.exists)
    running.kill(signal.SIGTERM)
    mercy = threading.Timer(30, running.kill)
    mercy.start()
    code = running.wait()
    mercy.cancel()
    assert code == 143, running.said
    assert "it is saved" in running.said


def test_a_step_that_takes_too_long_is_left_and_done_again(place: Place, tmp_path: Path) -> None:
    """The noise of the abandoned step must not count."""
    assert place.run(tmp_path / "wanted", NOISY).code == 0
    run, marker = tmp_path / "run", tmp_path / "marker"
    options = [*NOISY, "checkpoint.every=null"]
    prelude = SLOW.format(
        when="self.training.model.training and self.step == 3", marker=str(marker)
    )
    terminated(place.start(run, options, prelude=prelude), marker)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"]
    done = place.resume(run)
    assert done.code == 0, done.said
    name = "model/adapter_model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    assert records(run, "train") == records(tmp_path / "wanted", "train")


@pytest.mark.parametrize("step", [4, 8])
def test_an_evaluation_that_takes_too_long_is_owed(place: Place, tmp_path: Path, step: int) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    prelude = SLOW.format(
        when=f"not self.training.model.training and self.step == {step}", marker=str(marker)
    )
    options = ["device.micro_tokens=120"]
    assert place.run(tmp_path / "wanted", options).code == 0
    terminated(place.start(run, options, prelude=prelude), marker)
    state = json.loads((run / "checkpoints" / f"step-{step}" / "state.json").read_text())
    assert state["meta"]["owed_evaluation"]
    done = place.resume(run)
    assert done.code == 0, done.said
    assert_same_run(run, tmp_path / "wanted")
    again = place.resume(run)  # and is owed no more
    assert again.code == 0, again.said
    assert_same_run(run, tmp_path / "wanted")


def test_before_the_first_step_there_is_nothing_to_save(place: Place, tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    prelude = SLOW.format(when="self.training.model.training", marker=str(marker))
    running = place.start(run, ["device.micro_tokens=120"], prelude=prelude)
    running.until(marker.exists)
    running.kill(signal.SIGINT)
    assert running.wait() == 130, running.said
    assert "there was nothing to save" in running.said
    assert place.resume(run).code == 0
