"""Runs jobs on several ranks: one process imports everything and forks the ranks, which meet by
gloo as they do under torchrun.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DRIVER = """
import json, os, sys, traceback

import torch, torch.distributed
import transformers, peft, tunesmith.run
import tunesmith.result, tunesmith.train.build, tunesmith.train.trainer
from tunesmith.distributed.ranks import connect

torch.set_num_threads(1)
spec = json.loads(sys.argv[1])

def run(rank, group):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(group["ranks"]), LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(group["ranks"]), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(group["port"]),
    )
    code = 0
    for job in group["jobs"]:
        try:
            if job.pop("call", "train") == "resume":
                tunesmith.resume(job["out"], overrides=job["overrides"], progress=False)
            else:
                tunesmith.train(progress=False, **job)
        except tunesmith.TunesmithError as error:
            if not job.get("may_fail"):
                print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        except BaseException:
            print(f"rank {rank}:", file=sys.stderr)
            traceback.print_exc()
            code = 9
    try:
        connect().close()
    finally:
        os._exit(code)

codes = []
for group in spec["groups"]:
    children = []
    for rank in range(group["ranks"]):
        child = os.fork()
        if child == 0:
            run(rank, group)
        children.append(child)
    codes.append([os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children])
print(json.dumps(codes))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_groups(groups: Sequence[tuple[int, Sequence[Mapping[str, Any]]]]) -> list[list[int]]:
    """Exit codes of the ranks of each group; a group is (ranks, jobs), a job what `train` takes,
    or with `call: resume` an `out` and its overrides.
    """
    spec = {
        "groups": [
            {"ranks": ranks, "jobs": list(jobs), "port": free_port()} for ranks, jobs in groups
        ]
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(spec)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    if any(code for group in codes for code in group):
        sys.stderr.write(done.stderr)  # what pytest shows of a failure
    return codes


def weights(run: Path) -> dict[str, Any]:
    """The tensors of a run's result."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted((run / "model").glob("*.safetensors")):
        found.update(load_file(file))
    return found


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run, "train")]
