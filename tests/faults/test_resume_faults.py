"""What may have changed when a run goes on: checkpoints, versions, data."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fault_runs import KILL_AFTER, Place, assert_clean, assert_same_run

from tiny import chat_rows, write_jsonl

NEWEST = "checkpoints/step-6"


@pytest.fixture(scope="session")
def killed(place: Place) -> Path:
    """A run that was killed after step 6 of 8."""
    return place.killed_after(place.folder / "killed", 6)


@pytest.fixture
def run(killed: Path, tmp_path: Path) -> Path:
    """The run, to be harmed."""
    return Path(shutil.copytree(killed, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name"),
    [(cut, "optimizer.safetensors"), (flip, "optimizer.safetensors"), (Path.unlink, "state.json")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    place: Place, undisturbed: Path, run: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(run / NEWEST / name)
    done = place.run(run)
    assert done.code == 0, done.said
    assert f"checkpoint {run / NEWEST} is damaged and passed over: {name}" in done.said
    assert "from step 5, exact to the bit" in done.said
    assert_same_run(run, undisturbed)


def test_without_a_good_checkpoint_the_run_is_not_begun_again_unasked(
    place: Place, run: Path
) -> None:
    for path in (run / "checkpoints").iterdir():
        flip(path / "optimizer.safetensors")
    done = place.run(run)
    assert_clean(done, code=1)
    assert "every checkpoint of the run is damaged" in done.said
    assert "--overwrite" in done.said


def test_other_versions_are_said(place: Place, undisturbed: Path, run: Path) -> None:
    file, manifest = run / NEWEST / "state.json", run / NEWEST / "manifest.json"
    state = json.loads(file.read_text())
    state["meta"]["versions"]["torch"] = "2.0.1"
    state["meta"]["threads"] = 64
    file.write_text(json.dumps(state))
    listed = json.loads(manifest.read_text())
    listed["files"]["state.json"] = {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    manifest.write_text(json.dumps(listed))
    done = place.run(run)
    assert done.code == 0, done.said
    assert "exact within rounding: torch was 2.0.1, is" in done.said
    assert "threads was 64, is 1" in done.said
    assert_same_run(run, undisturbed)


@pytest.fixture
def moving(place: Place, tmp_path: Path) -> tuple[Path, Path]:
    """A run that was killed after step 6, and rows of its own."""
    rows = write_jsonl(tmp_path / "own.jsonl", chat_rows(14))
    run = tmp_path / "run"
    prelude = KILL_AFTER.format(step=6)
    done = place.server.run(place.arguments(run, rows=rows), prelude=prelude)
    assert done.code == -9, done.said
    return run, rows


def test_changed_rows_are_named_and_refused_unless_told(
    place: Place, moving: tuple[Path, Path]
) -> None:
    run, rows = moving
    changed = chat_rows(14)
    changed[3]["messages"][-1]["content"] = "other"
    write_jsonl(rows, changed)
    for refused in (place.resume(run), place.server.run(place.arguments(run, rows=rows))):
        assert_clean(refused, code=2)
        assert str(rows) in refused.said
        assert "--changed-data" in refused.said
    before = json.loads((run / "machine.json").read_text())
    killing = "import os\nfrom tunesmith.train.trainer import Trainer\nstep = Trainer._one_step"
    killing += "\ndef last(self):\n    self.step == 7 and os.kill(os.getpid(), 9)\n    step(self)"
    killing += "\nTrainer._one_step = last"
    told = place.resume(run, ["--changed-data"], prelude=killing)
    assert told.code == -9, told.said
    assert "the data has changed" in told.said
    after = json.loads((run / "machine.json").read_text())
    assert after["data"] != before["data"]
    assert after["data_before"] == [{**before["data"], **before["eval"]}]
    done = place.resume(run)  # the data is now the run's own
    assert done.code == 0, done.said
    learned = pq.read_table(run / "rows.parquet").to_pylist()
    assert {row["step"] for row in learned} == {7, 8}


def test_fewer_rows_than_steps_done_are_refused(place: Place, moving: tuple[Path, Path]) -> None:
    run, rows = moving
    write_jsonl(rows, chat_rows(4))
    done = place.resume(run, ["--changed-data"])
    assert_clean(done, code=1)
    assert "has done 6 steps, and with this data it would have only 2" in done.said


def test_changed_held_out_rows_are_refused(place: Place, moving: tuple[Path, Path]) -> None:
    run, rows = moving
    held_out = place.folder / "eval.jsonl"
    kept = held_out.read_bytes()
    try:
        write_jsonl(held_out, chat_rows(16)[14:])
        refused = place.resume(run)
        assert_clean(refused, code=2)
        assert "eval: its contents are not" in refused.said
    finally:
        held_out.write_bytes(kept)
    assert rows.exists()
