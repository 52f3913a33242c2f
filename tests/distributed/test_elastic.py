"""torchrun's own restart: a rank is killed, and the run goes on by itself from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gang import losses, records, run_groups, weights
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.distributed.env import restarted
from tunesmith.storage.run_folder import launched_run

OPTIONS = [
    "train.steps=60",
    "model.dtype=float32",
    "optim.lr=0.001",
    "batch.documents=4",
    "device.micro_tokens=96",
    "device.threads=1",
    "checkpoint.every=2",
    "checkpoint.keep=2",
]


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank that this launcher has started."""
    for entry in Path("/proc").iterdir():
        try:
            if (
                not entry.name.isdigit()
                or f"\nPPid:\t{launcher}\n" not in (entry / "status").read_text()
            ):
                continue
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError("no such rank")


def wait_for(run: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    while run.poll() is None and not list(folder.glob(pattern)):
        time.sleep(0.02)


@pytest.mark.slow  # two starts of two processes
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes as Linux does")
def test_a_killed_rank_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "model", num_hidden_layers=2)
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(14))
    given = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl")}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "2",
        "--nproc-per-node", "2", "-m", "tunesmith", "train",
        "--model", given["model"], "--data", given["data"], *OPTIONS,
    ]  # fmt: skip
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(run, tmp_path, "runs/*/checkpoints/step-4")
    os.kill(rank_process(run.pid, 1), signal.SIGKILL)
    stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr
    (out,) = (tmp_path / "runs").iterdir()
    assert stdout.splitlines() == [str(out.relative_to(tmp_path) / "model")]
    assert stderr.count("resume: from step") == 1, stderr
    assert "exact to the bit" in stderr
    assert [record["step"] for record in records(out, "train")] == list(range(1, 61))
    whole = {**given, "out": str(tmp_path / "whole"), "overrides": OPTIONS}
    codes, _ = run_groups([(2, [whole])])
    assert codes == [[0, 0]]
    assert losses(out) == losses(tmp_path / "whole")
    one, two = weights(out), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_only_a_restart_takes_what_is_there() -> None:
    assert restarted({"TORCHELASTIC_RESTART_COUNT": "1"})
    assert not restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert not restarted({})


def test_a_restart_finds_the_run_of_its_own_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launched_run("a") is None
    for name, launch in (("1", "a"), ("2", "a"), ("3", "b"), ("4", None)):
        place = tmp_path / "runs" / name
        place.mkdir(parents=True)
        (place / "machine.json").write_text(json.dumps({"launch": launch}))
        if name != "2":
            (place / "recipe.yaml").write_text("")
    assert launched_run("a") == Path("runs/1")
    assert launched_run("c") is None
