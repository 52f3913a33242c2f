"""A run written before recipe keys were renamed: it resumes, replays and evaluates today.

`old_run/make.py` wrote the folder with the tree of then. Its recipe says `attention: isolated` and
`prepare_processes`, and its checkpoint's meta says `context` and `tensor`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tunesmith
from tunesmith.config.read import read_recipe
from tunesmith.metrics.records import read_records
from tunesmith.replay import replay

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy at another place, with the paths in its files changed accordingly."""
    shutil.copytree(OLD, tmp_path / "old")
    made_in = json.loads((OLD / "run/machine.json").read_text())["asked"]["model"]["name"]
    for name in ("recipe.yaml", "machine.json", "ledger.json", "checkpoints/step-3/state.json"):
        file = tmp_path / "old/run" / name
        file.write_text(file.read_text().replace(str(Path(made_in).parent), str(tmp_path / "old")))
    return tmp_path / "old"


def fix_manifest(run: Path) -> None:
    """The manifest's digest of the state whose paths were changed."""
    import hashlib

    state, manifest = (
        run / "checkpoints/step-3/state.json",
        run / "checkpoints/step-3/manifest.json",
    )
    value = json.loads(manifest.read_text())
    content = state.read_bytes()
    value["files"]["state.json"] = {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    manifest.write_text(json.dumps(value))


def test_the_folder_has_the_old_names() -> None:
    recipe = (OLD / "run/recipe.yaml").read_text()
    assert "isolated" in recipe
    assert "prepare_processes: 1" in recipe
    meta = json.loads((OLD / "run/checkpoints/step-3/state.json").read_text())["meta"]
    assert meta["context"] == meta["tensor"] == 1


def test_it_resumes_to_the_losses_of_the_run_that_was_not_stopped(old: Path) -> None:
    fix_manifest(old / "run")
    tunesmith.resume(old / "run")
    records = [r for r in read_records(old / "run/metrics.jsonl") if r["kind"] == "train"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    # Not to the bit: the fixture was written on one kind of CPU, and tests run on several.
    expected = json.loads((OLD / "losses.json").read_text())
    assert [r["loss"] for r in records] == pytest.approx(expected, rel=1e-5)


def test_its_recipe_has_the_new_names(old: Path) -> None:
    device = read_recipe(old / "run").device
    assert (device.attention, device.num_proc) == ("unpacked", 1)


def test_it_is_replayed(old: Path) -> None:
    fix_manifest(old / "run")
    found = replay(old / "run", step=3)
    assert found.then is not None
    assert found.now["loss"] == pytest.approx(found.then["loss"], rel=1e-5)
