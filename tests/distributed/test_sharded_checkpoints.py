"""Parts of a checkpoint that several ranks write beside their steps."""

from __future__ import annotations

import pytest

from gang import losses, records, run_groups
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.checkpoint.folder import find_damage

pytestmark = pytest.mark.slow  # processes of several ranks

OPTIONS = [
    "train.steps=6",
    "model.dtype=float32",
    "optim.lr=0.01",
    "batch.documents=4",
    "device.shard=full",
    "checkpoint.every=3",
]
LATE = """
import os, threading
from pathlib import Path
from tunesmith.checkpoint.sharded import SavedPart
from tunesmith.train.trainer import Trainer
write, step = SavedPart.write, Trainer._one_step
reached, saves = threading.Event(), []

def late(self):
    saves.append(1)
    in_time = reached.wait(60)
    if len(saves) == 1:
        (Path({place!r}) / ("in-time-" + os.environ["RANK"])).write_text(str(in_time))
    return write(self)

def stepped(self):
    step(self)
    if self.step == 5:
        reached.set()

SavedPart.write, Trainer._one_step = late, stepped
"""
FULL = """
import os, resource
from tunesmith.checkpoint.sharded import SavedPart
write = SavedPart.write

def limited(self):
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return write(self)

SavedPart.write = limited
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("parts")
    model = str(tiny_folder(folder / "model", num_hidden_layers=2))
    data = str(write_jsonl(folder / "rows.jsonl", chat_rows(12)))

    def job(name: str, *more: str, prelude: str = ""):
        return {
            "model": model, "data": data, "out": str(folder / name),
            "overrides": [*OPTIONS, *more], "prelude": prelude,
        }  # fmt: skip

    codes, said = run_groups(
        [
            (2, [job("at-once", "checkpoint.background=false")]),
            (
                2,
                [job("late", "checkpoint.background=true", prelude=LATE.format(place=str(folder)))],
            ),
            (2, [job("full", prelude=FULL)]),
        ]
    )
    assert codes == [[0, 0], [0, 0], [1, 1]]
    return folder, said


def test_steps_go_on_on_every_rank(runs) -> None:
    folder, _ = runs
    assert [(folder / f"in-time-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    assert losses(folder / "late") == losses(folder / "at-once")
    saved = [r["step"] for r in records(folder / "late", "event") if r["event"] == "checkpoint"]
    assert saved == [3, 6]


def test_the_parts_are_of_the_step_they_are_named_by(runs) -> None:
    folder, _ = runs
    late, at_once = (folder / name / "checkpoints" / "step-3" for name in ("late", "at-once"))
    assert find_damage(late) is None
    names = sorted(path.name for path in (at_once / "parts").glob("*.distcp"))
    assert len(names) == 2
    for name in names:
        same = (late / "parts" / name).read_bytes() == (at_once / "parts" / name).read_bytes()
        assert same, name
    last = folder / "at-once" / "checkpoints" / "step-6" / "parts" / names[0]
    assert last.read_bytes() != (late / "parts" / names[0]).read_bytes()


def test_a_rank_that_can_not_write_is_told_by_all(runs) -> None:
    folder, said = runs
    assert "the checkpoint can't be written: File too large" in said
    assert "another rank can't write its part" in said
    assert not list((folder / "full" / "checkpoints").glob("step-*[0-9]"))
