"""Ranks killed at random moments and inside saves, and ranks that hang: the run goes on to the
bit.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from gang import losses, records, run_groups, weights
from tiny import chat_inputs
from tunesmith.storage.lock import take_lock

OPTIONS = [
    "train.steps=6",
    "model.dtype=float32",
    "optim.lr=0.003",
    "batch.documents=4",
    "device.micro_tokens=96",
    "checkpoint.every=1",
    "device.rank_timeout=0.2",
]
KINDS = {
    "whole": ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2"],
    "parts": ["device.shard=full"],
}
AT_CALL = """
import os, signal
from pathlib import Path
left = [{count}]

def kill():
    here = os.getppid()
    every = Path(f"/proc/{{here}}/task/{{here}}/children").read_text().split() if {all} else []
    for process in sorted(map(int, every), key=os.getpid().__eq__) or [os.getpid()]:
        os.kill(process, signal.SIGKILL)  # itself last

def counted(call):
    def wrapped(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            kill()
        return call(*args, **options)
    return wrapped

if rank == {rank}:
    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
"""
AT_TIME = """
import os, signal, threading
from tunesmith.train.trainer import Trainer
fit = Trainer.fit

def timed(self):
    if rank in {ranks}:
        timer = threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    fit(self)

Trainer.fit = timed
"""
HANGS = """
import threading
from tunesmith.train import watchdog
from tunesmith.train.trainer import Trainer
learn = Trainer._learn
watchdog.LOOK_SECONDS = 0.5
if rank == 0:  # which would wait for longer by itself
    watchdog.Watchdog.limit = property(lambda self: 3600.0)

def stuck_for_good():
    threading.Event().wait()

def hanging(self, number, lr):
    if rank == 1 and number == 2:
        stuck_for_good()
    return learn(self, number, lr)

Trainer._learn = hanging
"""
UNLIKE = ("seconds", "tokens_per_second", "peak_memory")
ALL = (0, 1)


def at_call(count: int, *ranks: int) -> str:
    """Killed at the so-many-th fsync or rename of the first of them."""
    return AT_CALL.format(count=count, rank=ranks[0], all=ranks == ALL)


def at_time(delay: float, *ranks: int) -> str:
    """Killed so many seconds after the first step could begin."""
    return AT_TIME.format(delay=delay, ranks=ranks)


def random_kills(kind: str, count: int, seed: int) -> list[str]:
    """Of the first rank, of the second, of both."""
    choice = random.Random(seed)
    found: list[str] = []
    for number in range(count):
        ranks = ((0,), (1,), ALL)[number % 3]
        writes = ranks != (1,) or kind == "parts"
        if writes and choice.random() < 0.7:
            found.append(at_call(choice.randint(1, 12 if ranks == (1,) else 40), *ranks))
        else:
            found.append(at_time(choice.uniform(0.0, 0.8), *ranks))
    return found


def starts(folder: Path, kind: str, preludes: list[str], *, out: str = "run") -> list[Any]:
    """Runs that are killed and started again, to the end."""
    inputs: dict[str, Any] = chat_inputs(folder, held_out=3)
    common = {**inputs, "overrides": [*OPTIONS, *KINDS[kind]], "resume": True}
    return [
        (2, [{**common, "out": str(folder / out), "prelude": text}]) for text in [*preludes, "pass"]
    ]


def assert_same_run(run: Path, wanted: Path) -> None:
    one, two = weights(run), weights(wanted)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert losses(run) == losses(wanted)
    for kind in ("train", "eval"):
        found, same = (
            [{k: v for k, v in r.items() if k not in UNLIKE} for r in records(place, kind)]
            for place in (run, wanted)
        )
        assert found == same
    rows = [pq.read_table(place / "rows.parquet") for place in (run, wanted)]
    assert rows[0].equals(rows[1])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], str]:
    """An undisturbed run. One with the second rank killed in the midst of its part, then both at
    once. One with a rank that hangs at step 3 while the other waits. One in a folder that is held.
    """
    folder = tmp_path_factory.mktemp("kills")
    kills = starts(folder, "parts", [at_call(2, 1), at_call(24, *ALL)])
    (_, [wanted]), (_, [hung]) = starts(folder, "parts", [], out="wanted") + starts(
        folder, "parts", [], out="hung"
    )
    asked = [*hung["overrides"], "device.watchdog=0.05", "device.rank_timeout=30"]
    hung = {**hung, "overrides": asked, "prelude": HANGS}
    again = {"call": "resume", "out": hung["out"], "overrides": []}
    (folder / "held").mkdir()
    lock = take_lock(folder / "held")  # of this process, as of another run
    held = {**wanted, "out": str(folder / "held")}
    try:
        return folder, *run_groups([(2, [wanted]), *kills, (2, [hung]), (2, [again]), (2, [held])])
    finally:
        lock.release()


@pytest.mark.slow
def test_killed_inside_saves_of_parts(story) -> None:
    folder, codes, said = story
    assert codes[0] == codes[3] == [0, 0]
    assert codes[1] == [1, -signal.SIGKILL]
    assert codes[2] == [-signal.SIGKILL] * 2
    assert "rank 0: rank 1 of 2 ended or can't be reached" in said
    assert "Traceback" not in said
    assert_same_run(folder / "run", folder / "wanted")


@pytest.mark.slow
def test_a_hung_rank_ends_all_and_every_rank_leaves_its_stacks(story) -> None:
    folder, codes, said = story
    assert codes[4:6] == [[1, 1], [0, 0]]
    stacks = [(folder / "hung" / f"stacks-rank-{rank}.txt").read_text() for rank in ALL]
    assert "stuck_for_good" in stacks[1]
    assert "stuck_for_good" not in stacks[0]
    assert "all_reduce" in stacks[0]  # where it waits
    assert "nothing has moved for 0.05 min, at step 3" in said
    assert "rank 1 has said that nothing moves; this one was at step 3" in said
    assert_same_run(folder / "hung", folder / "wanted")


@pytest.mark.slow
def test_ranks_are_locked_out_of_a_folder_that_is_held(story) -> None:
    folder, codes, said = story
    assert codes[6] == [2, 1]  # the second only learns that the first is gone
    assert said.count("another process is training in this folder") == 1
    assert f"process {os.getpid()} on" in said
    assert [path.name for path in (folder / "held").iterdir()] == [".lock"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(tmp_path: Path, kind: str) -> None:
    kills = random_kills(kind, 20, seed=7)
    groups = [*starts(tmp_path, kind, [], out="wanted"), *starts(tmp_path, kind, kills)]
    for _, (job,) in groups:
        job["overrides"] = [*job["overrides"], "train.steps=60"]
    (codes, *found), said = run_groups(groups, mercy=8.0)
    assert codes == found[-1] == [0, 0]
    assert sum(-signal.SIGKILL in code for code in found) >= 15
    assert all(set(code) <= {0, 1, -signal.SIGKILL} for code in found)
    assert "Traceback" not in said
    assert_same_run(tmp_path / "run", tmp_path / "wanted")
