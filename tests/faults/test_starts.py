"""Starts that fail leave nothing behind, and what a kill left undone is done at the next start."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest
from fault_runs import Place, assert_clean, assert_same_run
from safetensors.torch import load_file, save_file

from tunesmith.cli.app import run

WITHOUT = "import sys; sys.modules['trackio'] = None\n"
KILLED_IN_PRUNE = """
import os, shutil, signal
from tunesmith.checkpoint import folder
complete, prune = folder.complete_checkpoint, folder._prune
def late(parent, step, **options):
    if options["later"] and step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    prune(parent, step, **options)
folder._prune = late
"""
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_DATA, ({bytes}, {bytes}))
"""


def test_a_tracker_that_is_not_installed_leaves_no_folder(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = place.run(out, ["log.to=trackio"], prelude=WITHOUT)
    assert_clean(done, code=2)
    assert "trackio is not installed" in done.said
    assert not out.exists()
    again = place.run(out, ["train.steps=1", "train.epochs=null"])
    assert again.code == 0, again.said


def test_a_resume_without_its_tracker_changes_nothing(place: Place, tmp_path: Path) -> None:
    out = place.killed_after(tmp_path / "run", 2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    done = place.resume(out, ["log.to=trackio"], prelude=WITHOUT)
    assert_clean(done, code=2)
    now = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert before == now


def test_next_start_deletes_what_a_killed_prune_left(
    place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["checkpoint.keep=2", "checkpoint.background=false"]
    assert place.run(out, options, prelude=KILLED_IN_PRUNE).code == -9
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert steps[-1] == "step-4"
    assert len(steps) > 2
    stop = """
from tunesmith.train.trainer import Trainer
def stop(self): raise RuntimeError("before the first step")
Trainer.fit = stop
"""
    assert place.resume(out, prelude=stop).code == 1
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-3", "step-4"]
    assert place.resume(out).code == 0
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
@pytest.mark.parametrize("adapter", [[], ["adapter=lora"]])
def test_files_of_a_run_have_the_mode_that_the_umask_leaves(
    mask: int, adapter: list[str], place: Place, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = [*adapter, "train.steps=1", "train.epochs=null"]
    done = place.run(out, options, prelude=f"import os; os.umask({mask})")
    assert done.code == 0, done.said
    files = [path for path in out.rglob("*") if path.is_file()]
    assert [path for path in files if path.suffix == ".safetensors"]
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(
    value: float, place: Place, tmp_path: Path, capfd
) -> None:
    model = tmp_path / "model"
    shutil.copytree(place.folder / "model", model)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    data = str(place.folder / "rows.jsonl")
    for words in (
        ["eval", str(model), "--data", data],
        ["chat", str(model), "--prompt", "x"],
        ["generate", str(model), "--data", data, "--out", str(tmp_path / "a.jsonl")],
        ["score", "--model", str(model), "--data", data, "--out", str(tmp_path / "s.parquet")],
    ):
        assert run(words) == 1, words
        error = capfd.readouterr().err
        assert f"weight {name} holds values that are no numbers" in error, words


def test_a_limit_on_memory_is_an_error_that_says_so(place: Place, tmp_path: Path) -> None:
    """`ulimit -d`: each size ends in a run, or in an error with a hint; never in a traceback."""
    if not hasattr(resource, "RLIMIT_DATA") or not os.path.exists("/proc/self/status"):
        pytest.skip("needs limits of Linux")
    status = Path(f"/proc/{place.server._process.pid}/status").read_text()
    used = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    codes = []
    for number, more in enumerate((0, 4, 16, 64, 4096)):
        limit = (used << 10) + (more << 20)
        options = ["train.steps=1", "train.epochs=null", "device.num_proc=1"]
        done = place.run(tmp_path / str(number), options, prelude=LIMITED.format(bytes=limit))
        codes.append(done.code)
        assert done.code in (0, 1), done.said
        if done.code:
            assert_clean(done, code=1)
            assert "memory" in done.said
    assert codes[-1] == 0
