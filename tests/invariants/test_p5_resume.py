"""P5: killed at any instant and resumed, a run ends to the bit where it would have ended.

One process imports torch and forks the runs, each of which is really killed by SIGKILL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import tunesmith
from tiny import chat_inputs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

OPTIONS = [
    "batch.documents=4",
    "train.epochs=2",
    "checkpoint.every=1",
    "eval.every=2",
    "device.threads=1",
    "optim.lr=0.01",
]
LORA = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2"]
PSFT = ["objective=psft", "objective.outer_steps=3", "objective.neftune=1"]
SLOW_LORA = pytest.param(LORA, marks=pytest.mark.slow)
SLOW_PSFT = pytest.param(PSFT, marks=pytest.mark.slow)
UNLIKE = ("seconds", "tokens_per_second", "peak_memory")

DRIVER = """
import json, os, random, signal, sys, time

import torch
import transformers, peft, tunesmith.run
import tunesmith.run.result, tunesmith.build.build, tunesmith.train.trainer

spec = json.loads(sys.argv[1])

def die_at(count):
    left = [count]
    def counted(call):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapped
    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))

def run(count):
    if count:
        die_at(count)
    try:
        tunesmith.train(
            model=spec["model"], data=spec["data"], eval=spec["eval"], out=spec["out"],
            resume=True, overrides=spec["options"], progress=False,
        )
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def attempt(count=None, delay=None):
    child = os.fork()
    if child == 0:
        run(count)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

codes = [attempt(count=count) for count in spec["counts"]]
codes += [attempt(delay=delay) for delay in spec["delays"]]
codes.append(attempt())
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return chat_inputs(tmp_path_factory.mktemp("inputs"), held_out=3)


def undisturbed(inputs: dict[str, str], out: Path, options: list[str]) -> Path:
    return tunesmith.train(**inputs, out=out, overrides=options, progress=False).folder


def killed(
    inputs: dict[str, str], out: Path, options: list[str], *, counts=(), delays=()
) -> list[int]:
    spec = {**inputs, "out": str(out), "options": options, "counts": counts, "delays": delays}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(spec)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert set(codes) <= {0, -9}, done.stderr
    assert codes[-1] == 0
    return codes


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [record for line in lines if (record := json.loads(line))["kind"] == kind]
    return [{k: v for k, v in record.items() if k not in UNLIKE} for record in found]


def assert_same_run(run: Path, wanted: Path) -> None:
    weights = sorted(path.name for path in (wanted / "model").glob("*.safetensors"))
    assert weights
    for name in weights:
        assert (run / "model" / name).read_bytes() == (wanted / "model" / name).read_bytes()
    for kind in ("train", "eval"):
        assert records(run, kind) == records(wanted, kind)
    assert pq.read_table(run / "rows.parquet").equals(pq.read_table(wanted / "rows.parquet"))


@pytest.mark.parametrize("extra", [[], SLOW_LORA], ids=["full", "lora"])
def test_killed_in_every_part_of_a_save(inputs, tmp_path: Path, extra: list[str]) -> None:
    options = [*OPTIONS, *extra]
    wanted = undisturbed(inputs, tmp_path / "wanted", options)
    assert len(records(wanted, "train")) == 8  # 14 rows, twice, by 4
    counts = list(range(1, 19)) if not extra else [7, 11, 13, 16]
    codes = killed(inputs, tmp_path / "run", options, counts=counts)
    assert codes.count(-9) >= len(counts) - 3
    assert_same_run(tmp_path / "run", wanted)


@pytest.mark.parametrize("extra", [[], SLOW_LORA, SLOW_PSFT], ids=["full", "lora", "psft"])
def test_killed_at_random_moments(inputs, tmp_path: Path, extra: list[str]) -> None:
    import random

    options = [*OPTIONS, *extra]
    wanted = undisturbed(inputs, tmp_path / "wanted", options)
    random_delays = [random.Random(5).uniform(0.05, 0.9) for _ in range(6)]
    codes = killed(inputs, tmp_path / "run", options, delays=random_delays)
    assert -9 in codes
    assert_same_run(tmp_path / "run", wanted)
