from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tunesmith.checkpoint import folder as module
from tunesmith.checkpoint import tensor_io
from tunesmith.checkpoint.folder import (
    TrainState,
    clean_checkpoints,
    differences,
    find_damage,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from tunesmith.checkpoint.rng import capture_rng, restore_rng
from tunesmith.errors import CheckpointError


def state(step: int, size: int = 7) -> TrainState:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "w": torch.randn(size, 3, generator=generator),
        "half": torch.randn(size, generator=generator).to(torch.bfloat16),
        "turned": torch.randn(3, size, generator=generator).t(),
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor([True, False]),
        "steps": torch.tensor(step),
    }
    return TrainState(
        step,
        tensors,
        {"exp_avg.w": tensors["w"] * 2},
        capture_rng(),
        {"best": {"step": step, "nll": 0.1 + step}},
    )


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def assert_same(found: TrainState, wanted: TrainState) -> None:
    assert found.step == wanted.step
    assert found.meta == wanted.meta
    for ours, theirs in ((found.model, wanted.model), (found.optimizer, wanted.optimizer)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name]), name


def test_what_is_saved_comes_back(tmp_path):
    saved = state(5)
    path = save_checkpoint(tmp_path, saved, keep=2)
    assert path == tmp_path / "checkpoints" / "step-5"
    found = newest_checkpoint(tmp_path)
    assert (found.path, found.step, found.warnings) == (path, 5, ())
    assert_same(load_checkpoint(path), saved)
    assert load_file(path / "model.safetensors")["w"].shape == (7, 3)
    assert not list(path.glob("*.pt")), "nothing is pickled"


def test_random_generators_go_on_exactly(tmp_path):
    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    random.gauss(0, 1)
    np.random.standard_normal()
    path = save_checkpoint(tmp_path, state(1), keep=1)

    def draw():
        return torch.rand(4).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)

    wanted = draw()
    draw()
    restore_rng(load_checkpoint(path).rng)
    assert draw() == wanted


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 8):
        save_checkpoint(tmp_path, state(step), keep=2, best=3 if step >= 3 else None)
    assert names(tmp_path) == ["step-3", "step-6", "step-7"]
    save_checkpoint(tmp_path, state(12), keep=1, best=12)
    assert names(tmp_path) == ["step-12"]


def test_a_lower_keep_makes_room_before_it_writes(tmp_path, monkeypatch):
    for step in range(1, 6):
        save_checkpoint(tmp_path, state(step), keep=9)
    seen = []
    monkeypatch.setattr(module, "_write_files", lambda *_: seen.append(names(tmp_path)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, state(6), keep=1, best=2, good=4)
    assert seen == [["step-2", "step-4", "step-5", "step-6.tmp"]]


def test_an_abandoned_future_goes(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, state(step), keep=2)
    save_checkpoint(tmp_path, state(15), keep=2)
    assert names(tmp_path) == ["step-10", "step-15"]


def test_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, state(4), keep=2)
    again = state(4, size=9)
    save_checkpoint(tmp_path, again, keep=2)
    assert names(tmp_path) == ["step-4"]
    assert_same(load_checkpoint(newest_checkpoint(tmp_path).path), again)


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path):
    path = save_checkpoint(tmp_path, state(4), keep=2)
    os.rename(path, path.with_name("step-4.replaced"))
    clean_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path).step == 4


def test_leftovers_go_at_the_next_save(tmp_path):
    left = tmp_path / "checkpoints" / "step-3.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, state(4), keep=2)
    assert names(tmp_path) == ["step-4"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, name, damage):
    save_checkpoint(tmp_path, state(1), keep=3)
    path = save_checkpoint(tmp_path, state(2), keep=3)
    damage(path / name)
    found = newest_checkpoint(tmp_path)
    assert found.step == 1
    (warning,) = found.warnings
    assert str(path) in warning
    assert name in warning


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "files": {}}', '{"format": 99'])
def test_a_damaged_manifest_is_found(tmp_path, text):
    path = save_checkpoint(tmp_path, state(2), keep=3)
    (path / "manifest.json").write_text(text)
    assert "manifest.json" in (find_damage(path) or "")


def test_none_left_is_an_error_that_names_each(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        newest_checkpoint(tmp_path)
    for step in (1, 2):
        flip(save_checkpoint(tmp_path, state(step), keep=2) / "state.json")
    with pytest.raises(CheckpointError) as raised:
        newest_checkpoint(tmp_path)
    assert "step-1" in raised.value.message
    assert "step-2" in raised.value.message
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, call, number):
    wanted = state(1)
    save_checkpoint(tmp_path, wanted, keep=1)

    def fail(*args, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(CheckpointError) as raised:
            save_checkpoint(tmp_path, state(2), keep=1)
    assert ("disk is full" in raised.value.message) == (number == errno.ENOSPC)
    assert "step-1 is intact" in raised.value.message
    assert "resume" in raised.value.hint
    assert names(tmp_path) == ["step-1"]
    assert_same(load_checkpoint(newest_checkpoint(tmp_path).path), wanted)
    save_checkpoint(tmp_path, state(2), keep=1)
    assert names(tmp_path) == ["step-2"]


def test_large_tensors_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_io, "BLOCK", 100)
    saved = state(3, size=1000)
    assert_same(load_checkpoint(save_checkpoint(tmp_path, saved, keep=1)), saved)


def test_differences_are_said_by_name():
    saved = {"versions": {"torch": "2.12", "numpy": "2"}, "world_size": 1, "threads": 2}
    now = {"versions": {"torch": "2.13", "numpy": "2"}, "world_size": 1, "threads": 4}
    assert differences(saved, saved) == []
    assert differences(saved, now) == ["torch was 2.12, is 2.13", "threads was 2, is 4"]


KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from tunesmith.checkpoint.folder import (
    TrainState, clean_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint,
)
from tunesmith.checkpoint.rng import RngState

run, trials = Path(sys.argv[1]), int(sys.argv[2])
rng = RngState({"cpu": torch.get_rng_state()}, [], [])

def save(step):
    tensors = {f"t{i}": torch.full((20_000,), float(step)) for i in range(4)}
    save_checkpoint(run, TrainState(step, tensors, tensors, rng, {}), keep=2)

def save_without_pause(step, pipe):
    clean_checkpoints(run)
    while True:
        step += 1
        save(step)
        os.write(pipe, step.to_bytes(4, "little"))

started = time.monotonic()
save(1)
one_save = time.monotonic() - started
choice, newest, torn = random.Random(0), 1, 0
for _ in range(trials):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        save_without_pause(newest, write)
    os.close(write)
    time.sleep(choice.uniform(0.0, 4 * one_save))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    reported = int.from_bytes(said[-4:], "little") if said else newest
    torn += any(e.name.endswith(".tmp") for e in (run / "checkpoints").iterdir())
    found = newest_checkpoint(run)
    assert found.warnings == (), found.warnings
    assert reported <= found.step <= reported + 1, (reported, found.step)
    state = load_checkpoint(found.path)
    assert state.step == found.step
    assert all((t == found.step).all() for t in [*state.model.values(), *state.optimizer.values()])
    newest = found.step
print(json.dumps({"saved": newest, "torn": torn}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_random_moments_leaves_whole_checkpoints(tmp_path):
    """Kills a process that saves without pause: what it reported is there, whole and newest."""
    finished = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), "25"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    counts = json.loads(finished.stdout)
    assert counts["saved"] > 1, counts
    assert counts["torn"] > 0, "no kill fell inside a save"
