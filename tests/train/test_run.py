"""Starting, going on with and refusing runs, from Python."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.errors import DataError, InputError, NonFiniteError, RecipeError

SHORT = ["batch.documents=4", "train.steps=4", "checkpoint.every=1", "device.threads=1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    return {
        "model": str(tiny_folder(folder / "llama", num_hidden_layers=1)),
        "data": str(write_jsonl(folder / "rows.jsonl", chat_rows(8))),
    }


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    return tunesmith.train(**inputs, out=out, overrides=SHORT, progress=False).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_damaged_newest_checkpoint_is_passed_over(run: Path, finished: Path, capsys) -> None:
    victim = run / "checkpoints" / "step-4" / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    shutil.rmtree(run / "model")
    tunesmith.resume(run)
    assert "step-4" in capsys.readouterr().err
    assert weights(run) == weights(finished)


def test_finished_run_resumed_stays_as_it_is(run: Path, finished: Path) -> None:
    tunesmith.resume(run, progress=False)
    assert weights(run) == weights(finished)


def test_resume_refuses_what_changes_learning(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"optim\.lr") as caught:
        tunesmith.resume(run, overrides=["optim.lr=0.5"], progress=False)
    assert f"train --model {run}" in str(caught.value)


def test_same_recipe_goes_on_and_another_is_refused(inputs, run: Path, finished: Path) -> None:
    tunesmith.train(**inputs, out=run, resume=True, overrides=SHORT, progress=False)
    assert weights(run) == weights(finished)
    other = [*SHORT, "optim.lr=0.5"]
    with pytest.raises(RecipeError, match="another recipe"):
        tunesmith.train(**inputs, out=run, resume=True, overrides=other, progress=False)


def test_changed_data_is_refused_and_named(inputs, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "mine.jsonl", chat_rows(8))
    out = tmp_path / "out"
    tunesmith.train(model=inputs["model"], data=data, out=out, overrides=SHORT, progress=False)
    write_jsonl(data, chat_rows(9))
    with pytest.raises(DataError, match=r"mine\.jsonl"):
        tunesmith.resume(out, progress=False)


def test_overwrite_replaces_only_runs(inputs, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError):
        tunesmith.train(**inputs, out=tmp_path, overwrite=True, overrides=SHORT, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_recipe_of_a_run_gives_the_same_weights(
    run: Path, finished: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = tunesmith.train(run / "recipe.yaml", out=tmp_path / "B", progress=False)
    assert weights(again.folder) == weights(finished)


def test_nan_stops_the_run(tmp_path: Path, inputs) -> None:
    out = tmp_path / "out"
    with pytest.raises(NonFiniteError) as caught:
        tunesmith.train(**inputs, out=out, overrides=[*SHORT, "optim.lr=1e30"], progress=False)
    assert caught.value.exit_code == 1
    for step in (out / "checkpoints").iterdir():
        assert json.loads((step / "manifest.json").read_text())["files"]
    assert os.listdir(out / "checkpoints")
    (incident,) = out.glob("incident-*/rows.json")
    rows = json.loads(incident.read_text())["rows"]
    assert rows
    assert all(row["row"] and row["ids"] for row in rows)
    assert any(isinstance(row["loss_sum"], str) for row in rows)
