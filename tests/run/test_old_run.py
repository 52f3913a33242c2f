"""A run written before recipe keys were renamed: it resumes, and commands read it today.

`old_run/make.py` wrote the folder with the tree of then. Its recipe says `attention: isolated` and
`prepare_processes`, and its checkpoint's meta says `context` and `tensor`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import tunesmith
from tunesmith.checkpoint.folder import differences, load_checkpoint
from tunesmith.cli.app import run as command
from tunesmith.config.read import read_recipe
from tunesmith.errors import RecipeError
from tunesmith.metrics.records import read_records
from tunesmith.replay import replay

OLD = Path(__file__).parent / "old_run"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return copied(tmp_path)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that was resumed to its end."""
    folder = copied(tmp_path_factory.mktemp("resumed"))
    tunesmith.resume(folder / "run", progress=False)
    return folder


def copied(folder: Path) -> Path:
    """A copy at another place, with the paths in its files changed accordingly."""
    shutil.copytree(OLD, folder / "old")
    made_in = json.loads((OLD / "run/machine.json").read_text())["asked"]["model"]["name"]
    for name in ("recipe.yaml", "machine.json", "ledger.json", "checkpoints/step-3/state.json"):
        file = folder / "old/run" / name
        file.write_text(file.read_text().replace(str(Path(made_in).parent), str(folder / "old")))
    fix_manifest(folder / "old/run")
    return folder / "old"


def fix_manifest(run: Path) -> None:
    """Give the manifest the digest of the state whose paths were changed."""
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


def test_it_resumes_to_the_losses_of_the_run_that_was_not_stopped(resumed: Path) -> None:
    records = [r for r in read_records(resumed / "run/metrics.jsonl") if r["kind"] == "train"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    # Not to the bit: the fixture was written on one kind of CPU, and tests run on several.
    expected = json.loads((OLD / "losses.json").read_text())
    assert [r["loss"] for r in records] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["export", "RUN", "--to", "hf", "--out", "OUT"],
        ["eval", "RUN", "--data", "ROWS", "eval.max_new_tokens=2"],
        ["plan", "RUN"],
        ["verify", "RUN"],
        ["train", "RUN/recipe.yaml", "--out", "OUT", "train.steps=1"],
    ],
    ids=lambda words: words[0],
)
def test_commands_read_it(resumed: Path, tmp_path: Path, words: list[str]) -> None:
    names = {"RUN": resumed / "run", "ROWS": resumed / "rows.jsonl", "OUT": tmp_path / "out"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    assert command(words) == 0


def test_an_old_name_given_to_a_resume_is_an_error(old: Path) -> None:
    with pytest.raises(RecipeError, match=r"device\.num_proc"):
        tunesmith.resume(old / "run", overrides=["device.prepare_processes=2"])


def test_its_checkpoint_has_the_new_names() -> None:
    now = {"context_parallel": 1, "tensor_parallel": 1}
    meta = load_checkpoint(OLD / "run/checkpoints/step-3").meta
    assert meta.items() >= now.items()
    assert differences(meta, {**meta, "context_parallel": 2}) == ["context parallel was 1, is 2"]


def test_its_recipe_has_the_new_names(old: Path) -> None:
    device = read_recipe(old / "run").device
    assert (device.attention, device.num_proc) == ("unpacked", 1)


def test_it_is_replayed(old: Path) -> None:
    found = replay(old / "run", step=3)
    assert found.then is not None
    assert found.now["loss"] == pytest.approx(found.then["loss"], rel=1e-5)
