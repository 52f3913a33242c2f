"""Two hosts with a wire between them that is cut in mid-step: both end, and the run goes on.

The hosts are network namespaces, which only root may make.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gang import losses, records
from tiny import chat_rows, tiny_folder, write_jsonl

OPTIONS = [
    "model.dtype=float32", "batch.documents=4", "device.micro_tokens=96", "checkpoint.every=5",
    "checkpoint.keep=1000", "device.rank_timeout=0.2", "device.kind=cpu", "optim.lr=0.0001",
    "optim.schedule=constant", "optim.warmup=0",  # the same rate whatever the number of steps
]  # fmt: skip
HOSTS = ("tunesmith-a", "tunesmith-b")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need root and ip")
    made: list[str] = []
    try:
        for name in HOSTS:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "wire-a", "netns", HOSTS[0], "type", "veth",
           "peer", "name", "wire-b", "netns", HOSTS[1])  # fmt: skip
        for number, (name, wire) in enumerate(zip(HOSTS, ("wire-a", "wire-b"), strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", wire)
            ip("-n", name, "link", "set", wire, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"no network namespaces here: {error.stderr.decode()}")
    yield
    for name in made:
        ip("netns", "del", name)


def start(rank: int, *arguments: str) -> subprocess.Popen[str]:
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank),
        "--nproc-per-node", "1", "--master-addr", "10.77.0.1", "--master-port", "29511",
    ]  # fmt: skip
    wire = ("wire-a", "wire-b")[rank]
    return subprocess.Popen(
        ["ip", "netns", "exec", HOSTS[rank], *launcher, "-m", "tunesmith", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": wire},
    )


@pytest.mark.slow
def test_a_cut_wire_ends_both_sides_and_the_run_goes_on(hosts, tmp_path: Path) -> None:
    model = str(tiny_folder(tmp_path / "llama", num_hidden_layers=2))
    data = str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(14)))
    out = tmp_path / "run"
    arguments = ["train", "--model", model, "--data", data, "--out", str(out), *OPTIONS]
    sides = [start(rank, *arguments, "train.steps=1000000") for rank in range(2)]
    try:
        until = time.monotonic() + 180
        while not list(out.glob("checkpoints/step-??")) and time.monotonic() < until:
            assert all(side.poll() is None for side in sides), sides[0].communicate()
            time.sleep(0.2)
        ip("-n", HOSTS[0], "link", "set", "wire-a", "down")
        said = [side.communicate(timeout=120) for side in sides]
    finally:
        for side in sides:
            if side.poll() is None:
                side.send_signal(signal.SIGKILL)
    assert all(side.returncode not in (0, None) for side in sides)
    assert "rank 1 of 2 ended or can't be reached" in said[0][1]
    assert "can't be reached" in said[1][1]
    reached = max(int(p.name[5:]) for p in out.glob("checkpoints/step-*") if p.name[5:].isdigit())
    assert_goes_on(out, reached, model, data)


def assert_goes_on(out: Path, reached: int, model: str, data: str) -> None:
    """Resumed by one process up to a few steps more, it learns what one process learns alone."""
    import tunesmith

    steps = reached + 3
    short = [*OPTIONS, f"train.steps={steps}"]
    options = {"model": model, "data": data, "progress": False}
    alone = tunesmith.train(out=out.with_name("alone"), overrides=short, **options).folder
    assert reached > 0
    assert [r["step"] for r in records(out, "train")][:reached] == list(range(1, reached + 1))
    np.testing.assert_allclose(losses(out)[:reached], losses(alone)[:reached], rtol=1e-4)
    resumed = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", "resume", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while resumed.poll() is None and not list(out.glob(f"checkpoints/step-{reached + 5}")):
        time.sleep(0.1)
    resumed.send_signal(signal.SIGTERM)
    _, said = resumed.communicate(timeout=60)
    assert resumed.returncode == 143, said
    assert f"from step {reached}" in said
    found = [r["step"] for r in records(out, "train")]
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= reached + 5
    np.testing.assert_allclose(losses(out)[:steps], losses(alone), rtol=1e-4)
