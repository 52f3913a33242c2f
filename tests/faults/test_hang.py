"""A step that hangs, and clocks that jump."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_runs import Place, assert_clean, assert_same_run, records

from tunesmith.train.watchdog import AUTO_SECONDS, AUTO_TIMES, Watchdog

HANG = """
import threading, time
from tunesmith.train.trainer import Trainer
learn, calls = Trainer._learn, [0]
def stuck_for_good():
    threading.Event().wait()
def hanging(self, number, lr):
    if number == 3:
        stuck_for_good()
    return learn(self, number, lr)
Trainer._learn = hanging
"""
JUMPS = """
import time, datetime
real, calls = time.time, [0]
def jumping():
    calls[0] += 1
    return real() + {jump} * (-1) ** calls[0] * calls[0]
time.time = jumping
time.time_ns = lambda: int(jumping() * 1e9)
"""


def test_a_hung_step_ends_the_run_and_leaves_the_stacks(
    place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = place.run(run, ["device.watchdog=0.05"], prelude=HANG)
    assert_clean(done, code=1)
    assert "nothing has moved for 0.05 min, at step 4" in done.said
    stacks = (run / "stacks.txt").read_text()
    assert "stuck_for_good" in stacks
    assert stacks.count("hread 0x") >= 2  # the others', too
    resumed = place.resume(run)
    assert resumed.code == 0, resumed.said
    assert_same_run(run, undisturbed)


def test_without_a_watchdog_nothing_ends_it(place: Place, tmp_path: Path) -> None:
    hung = place.start(tmp_path / "run", ["device.watchdog=null"], prelude=HANG)
    try:
        hung.until(lambda: (tmp_path / "run" / "checkpoints" / "step-3").is_dir())
        assert not hung.ended()
    finally:
        hung.kill()
    assert hung.wait() == -9


@pytest.mark.parametrize("jump", [86400.0, -3600.0])
def test_clocks_may_jump(place: Place, undisturbed: Path, tmp_path: Path, jump: float) -> None:
    run = tmp_path / "run"
    done = place.run(
        run, ["checkpoint.every=10 min", "eval.every=2"], prelude=JUMPS.format(jump=jump)
    )
    assert done.code == 0, done.said
    assert_same_run(run, undisturbed)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-8"]
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert '"seconds": -' not in line


def test_time_that_stood_still_is_not_counted(tmp_path: Path) -> None:
    import threading

    ended = threading.Event()
    now = [0.0]

    class Dog(Watchdog):
        def _end(self) -> None:
            ended.set()
            self._done.set()

    dog = Dog(0.05, tmp_path, clock=lambda: now[0])
    with dog.watching():
        now[0] += 1000.0  # stopped, and gone on with
        assert not ended.wait(2.0)
        for _ in range(12):
            now[0] += 0.75
            if ended.wait(0.9):
                break
        assert ended.is_set()


def test_by_itself_the_limit_grows_with_the_pauses(tmp_path: Path) -> None:
    now = [0.0]
    dog = Watchdog("auto", tmp_path, clock=lambda: now[0])
    assert dog.limit == AUTO_SECONDS
    now[0] = 1000.0
    dog.beat()
    assert dog.limit == AUTO_TIMES * 1000.0


def test_records_have_no_time_of_day(undisturbed: Path) -> None:
    assert all("time" not in record for record in records(undisturbed, "train"))
