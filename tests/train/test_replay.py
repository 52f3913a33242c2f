"""`tunesmith replay`: a step taken again is the one that was taken, and the run stays as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_anomaly import SECTIONS, poisoned, start

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.errors import DataError, InputError, NonFiniteError
from tunesmith.metrics.records import read_records
from tunesmith.replay import replay

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("given")
    tiny_folder(place / "model", num_hidden_layers=2)
    write_jsonl(place / "rows.jsonl", chat_rows(16))
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Eight steps with dropout, so that random state counts; saved after 3 and 6."""
    start(
        folder, folder / "run", checkpoint={"every": 3, "keep": 9},
        adapter={"kind": "lora", "rank": 4, "dropout": 0.2},
    )  # fmt: skip
    return folder / "run"


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def recorded(run: Path, step: int) -> dict:
    (record,) = (r for r in read_records(run / "metrics.jsonl", kind="train") if r["step"] == step)
    return record


@pytest.mark.parametrize(("step", "first"), [(1, 0), (3, 0), (4, 3), (6, 3), (8, 6)])
def test_a_step_is_the_same_to_the_bit(run: Path, step: int, first: int) -> None:
    before = contents(run)
    found = replay(run, step)
    assert found.start == first
    assert found.unlike == []
    assert found.equal is True
    record = recorded(run, step)
    assert found.now["loss"] == record["loss"]
    assert found.now["grad_norm"] == record["grad_norm"]
    assert contents(run) == before


def test_its_documents_are_those_of_the_rows_file(run: Path) -> None:
    found = replay(run, 5)
    table = pq.read_table(run / "rows.parquet").to_pylist()
    wanted = {
        f"{row['source']}:{row['row']}": (row["loss"], row["weight"], row["target_tokens"])
        for row in table
        if row["step"] == 5
    }
    seen = {d["row"]: (d["loss"], d["weight"], d["targets"]) for d in found.documents}
    assert seen == wanted
    assert len(seen) == SECTIONS["batch"]["documents"]
    losses = [document["loss"] for document in found.documents]
    assert losses == sorted(losses, reverse=True)


def test_a_damaged_checkpoint_is_passed_over_and_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "checkpoints" / "step-3" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = replay(copy, 5)
    assert found.start == 0
    assert "step-3" in found.notes[0]
    assert found.equal is True


def test_other_numbers_are_said(run: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    for record in changed:
        if record.get("step") == 4 and record["kind"] == "train":
            record["loss"] *= 1 + 1e-12
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
    assert command(["replay", str(copy), "--step", "4"]) == 1
    said = capsys.readouterr().out
    assert "NOT equal to metrics.jsonl: loss is" in said
    assert command(["replay", str(copy), "--step", "5", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["equal"] is True
    assert record["now"] == record["then"]
    assert len(record["documents"]) == 4


def test_a_step_that_stopped_the_run_is_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    poisoned(monkeypatch, {5})
    with pytest.raises(NonFiniteError):
        start(folder, tmp_path / "run", checkpoint={"every": 2})
    before = contents(tmp_path / "run")
    assert command(["replay", str(tmp_path / "run"), "--step", "5"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "no record of this step" in said[1]
    assert said[3].split()[1] == "nan"
    assert said[4].split()[1] != "nan"
    assert contents(tmp_path / "run") == before


def test_what_is_not_there_is_refused(run: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run"):
        replay(tmp_path, 1)
    with pytest.raises(InputError, match="8 steps"):
        replay(run, 9)
    assert command(["replay", str(tmp_path), "--step", "1"]) == 2


def test_changed_data_is_refused(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "given"
    shutil.copytree(folder / "model", place / "model")
    write_jsonl(place / "rows.jsonl", chat_rows(8))
    start(place, tmp_path / "run", train={"epochs": 1})
    write_jsonl(place / "rows.jsonl", chat_rows(9))
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        replay(tmp_path / "run", 1)


def test_gradients_of_documents_leave_the_step_as_it_was(run: Path, capsys: Capture) -> None:
    plain, found = replay(run, 5), replay(run, 5, gradients=True)
    assert found.equal is True
    assert found.now == plain.now
    norms = [document["grad_norm"] for document in found.documents]
    assert min(norms) > 0
    assert found.now["grad_norm"] <= sum(norms) * 1.5  # dropout draws other numbers
    assert command(["replay", str(run), "--step", "5", "--gradients"]) == 0
    assert "grad norm" in capsys.readouterr().out


def test_the_gradient_of_a_document_alone_is_the_steps(folder: Path, tmp_path: Path) -> None:
    start(folder, tmp_path / "run", batch={"documents": 1}, train={"epochs": 0.25})
    found = replay(tmp_path / "run", 3, gradients=True)
    (document,) = found.documents
    assert document["grad_norm"] == pytest.approx(found.now["grad_norm"], rel=1e-6)
    assert document["loss"] == pytest.approx(found.now["loss"], rel=1e-6)
