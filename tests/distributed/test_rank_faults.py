"""A rank that ends or is told to stop: all end cleanly, and the run goes on with any number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gang import losses, records, run_groups, weights
from tiny import chat_inputs

OPTIONS = [
    "train.steps=6",
    "model.dtype=float32",
    "optim.lr=0.003",
    "batch.documents=4",
    "device.micro_tokens=96",
    "checkpoint.every=1",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return chat_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def story(inputs, tmp_path_factory: pytest.TempPathFactory):
    """An undisturbed run; one with a rank killed, one told to stop, and how these go on."""
    folder = tmp_path_factory.mktemp("faults")

    def job(name: str, **more):
        return {**inputs, "out": str(folder / name), "overrides": OPTIONS, **more}

    def on(name: str):
        return {"call": "resume", "out": str(folder / name), "overrides": []}

    first, said = run_groups(
        [
            (1, [job("whole")]),
            (2, [job("killed", signal_after=[1, 3, signal.SIGKILL])]),
            (3, [job("stopped", signal_after=[2, 2, signal.SIGTERM])]),
            (2, [job("whole-2")]),
        ]
    )
    for name, other in (("killed", "killed-more"), ("stopped", "stopped-alone")):
        shutil.copytree(folder / name, folder / other)
    steps = {name: _newest(folder / name) for name in ("killed", "stopped")}
    resumed, _ = run_groups(
        [
            (1, [on("killed"), on("stopped-alone")]),
            (2, [on("killed-more")]),
            (4, [on("stopped")]),
        ]
    )
    return folder, first, said, steps, resumed


def _newest(run: Path) -> int:
    names = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return max(int(name) for name in names if name.isdigit())


def test_the_others_end_and_name_the_rank_that_was_killed(story) -> None:
    _, codes, said, steps, _ = story
    assert codes[1] == [1, -signal.SIGKILL]
    assert "rank 0: rank 1 of 2 ended or can't be reached" in said
    assert "resume" in said
    assert steps["killed"] in (2, 3)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(story) -> None:
    _, codes, said, steps, _ = story
    assert codes[2] == [143, 143, 143]
    assert steps["stopped"] == 2
    assert said.count("stopped by SIGTERM after step 2 of 6") == 1


@pytest.mark.parametrize("name", ["killed", "killed-more", "stopped", "stopped-alone"])
def test_it_goes_on_with_another_number_of_ranks(story, name: str) -> None:
    folder, codes, _, _, resumed = story
    assert codes[0] == [0]
    assert resumed == [[0], [0, 0], [0] * 4]
    whole, found = folder / "whole", folder / name
    assert [r["step"] for r in records(found, "train")] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(losses(found), losses(whole), rtol=2e-5)
    one, many = weights(whole), weights(found)
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=2e-4, atol=2e-5)


def test_with_as_many_ranks_it_goes_on_to_the_bit(story) -> None:
    folder, codes, _, _, _ = story
    assert codes[3] == [0, 0]
    one, many = weights(folder / "whole-2"), weights(folder / "killed-more")
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert losses(folder / "whole-2") == losses(folder / "killed-more")


@pytest.mark.slow  # the next test goes the same way, by the same launcher
def test_torchrun_speaks_with_one_voice(inputs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["--model", inputs["model"], "--data", inputs["data"], "--out", str(out)]
    done = subprocess.run(
        [
            *launcher,
            "--nproc-per-node",
            "2",
            "-m",
            "tunesmith",
            "train",
            *arguments,
            *OPTIONS,
            "train.steps=2",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(out / "model")]
    assert done.stderr.count("step 2/2") == 1
    assert json.loads((out / "machine.json").read_text())["world_size"] == 2


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_command_starts_its_ranks_and_hands_signals_on(inputs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--model", inputs["model"], "--data", inputs["data"], "--out", str(out)]
    wanted = [*OPTIONS, "device.ranks=2", "device.kind=cpu", "batch.documents=1"]
    run = command("train", *arguments, *wanted, "train.steps=100000")
    while run.poll() is None and not list(out.glob("checkpoints/step-*")):
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate()
    assert run.returncode == 143, stderr
    assert stdout == ""
    assert stderr.count("stopped by SIGTERM") == 1
    assert "of the time of 2 ranks is idle" in stderr
    assert "Traceback" not in stderr
    done = _newest(out)
    assert records(out, "train")[-1]["step"] == done
    assert json.loads((out / "machine.json").read_text())["world_size"] == 2
