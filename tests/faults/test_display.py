"""What a run shows can't end it: the reader of its output dies, or its log's disk is full."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from fault_runs import Place, assert_same_run, events

DEAD = """
import os
ends = [os.pipe() for _ in range(2)]
for number, (reader, writer) in zip((1, 2), ends):
    os.dup2(writer, number), os.close(reader), os.close(writer)
"""
FULL = """
import os
for number in (1, 2):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)
"""
FORCED = "import os; os.environ['FORCE_COLOR'] = '1'; os.environ['TTY_COMPATIBLE'] = '1'\n"


@pytest.mark.parametrize("kind", ["dead reader", "full device", "dead reader of a progress bar"])
def test_a_run_goes_on_without_anybody_to_show_it_to(
    kind: str, place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    if kind == "full device" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    prelude = FULL if kind == "full device" else DEAD
    prelude = FORCED + prelude if "bar" in kind else prelude
    run = tmp_path / "run"
    done = place.run(run, prelude=prelude)
    assert done.code in (0, 1)  # 1: the name of the result could not be written to stdout
    assert_same_run(run, undisturbed)
    assert (run / "report.html").is_file()


def test_errors_keep_their_exit_code_without_a_reader(place: Place, tmp_path: Path) -> None:
    done = place.server.run(["train", str(tmp_path / "nothing.yaml")], prelude=DEAD)
    assert done.code == 2


SLOW = """
import time
from tunesmith.train.trainer import Trainer
step = Trainer._one_step
def slow(self):
    step(self)
    if self.step == 3:
        open({marker!r}, "w").close()
        time.sleep(1)
Trainer._one_step = slow
"""


def test_a_terminal_that_closes_leaves_a_saved_run(
    place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    """It sends SIGHUP twice, and takes standard error away."""
    run, marker = tmp_path / "run", tmp_path / "marker"
    prelude = SLOW.format(marker=str(marker))
    running = place.start(run, ["checkpoint.every=null"], prelude=prelude)
    running.until(marker.exists)
    running.kill(signal.SIGHUP)
    running.kill(signal.SIGHUP)
    assert running.wait() == 129, running.said
    assert "stopped by SIGHUP after step 3" in running.said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-3"]
    assert events(run, "interrupted")
    done = place.resume(run)
    assert done.code == 0, done.said
    assert_same_run(run, undisturbed)


def test_nohup_is_obeyed(place: Place, undisturbed: Path, tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    running = place.start(run, prelude=ignored + SLOW.format(marker=str(marker)))
    running.until(marker.exists)
    running.kill(signal.SIGHUP)
    assert running.wait() == 0, running.said
    assert_same_run(run, undisturbed)


def test_first_interrupt_is_answered_at_once(place: Place, tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    prelude = SLOW.format(marker=str(marker)).replace("time.sleep(1)", "hold()")
    hold = """
import pathlib
def hold():
    while not pathlib.Path({free!r}).exists():
        time.sleep(0.01)
"""
    free = tmp_path / "free"
    running = place.start(run, prelude=hold.format(free=str(free)) + prelude)
    running.until(marker.exists)
    running.kill(signal.SIGINT)
    # the step is held, and still it is said
    running.until(lambda: "SIGINT: finishing step" in running.said)
    assert "then saving; again to abort" in running.said
    free.touch()
    assert running.wait() == 130, running.said
    assert "it is saved" in running.said


def test_second_interrupt_aborts(place: Place, tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    prelude = SLOW.format(marker=str(marker)).replace("time.sleep(1)", "time.sleep(600)")
    running = place.start(run, prelude=prelude)
    running.until(marker.exists)
    running.kill(signal.SIGINT)
    running.until(lambda: "again to abort" in running.said)
    running.kill(signal.SIGINT)
    assert running.wait() == 130, running.said
    assert "it is saved" not in running.said
