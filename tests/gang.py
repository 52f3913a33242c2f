"""Runs jobs on several ranks: one process imports everything and forks the ranks, which meet by
gloo as they do under torchrun.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DRIVER = """
import json, os, signal, sys, time, traceback

import torch, torch.distributed, torch.distributed.tensor
import torch.distributed.fsdp, torch.distributed.checkpoint, torch.distributed.device_mesh
import transformers, peft, tunesmith.run
import tunesmith.run.result, tunesmith.build.build, tunesmith.train.trainer
from tunesmith.distributed.rank_failure import is_told_here
from tunesmith.train.trainer import Trainer
from tunesmith.distributed.world import connect

torch.set_num_threads(1)
spec = json.loads(sys.argv[1])
one_step = Trainer._one_step

def raise_signal(rank, at):
    def step(self):
        one_step(self)
        if [rank, self.step] == at[:2]:
            os.kill(os.getpid(), at[2])
    Trainer._one_step = step if at else one_step

def run(rank, group):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(group["ranks"]),
        LOCAL_RANK=str(rank % group["machine"]),
        LOCAL_WORLD_SIZE=str(group["machine"]), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True",
    )
    code = 0
    for job in group["jobs"]:
        raise_signal(rank, job.pop("signal_after", None))
        exec(job.pop("prelude", ""), {"rank": rank})
        exec(job.pop("prelude", ""), {"__name__": "prelude"})
        try:
            if job.pop("call", "train") == "resume":
                tunesmith.resume(job["out"], overrides=job["overrides"], progress=False)
            else:
                tunesmith.train(progress=False, **job)
        except tunesmith.TunesmithError as error:
            if is_told_here(error):
                print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
            break
        except BaseException:
            print(f"rank {rank}:", file=sys.stderr)
            traceback.print_exc()
            code = 9
            break
    try:
        if code == 0:
            connect().close()
    finally:
        os._exit(code)

def ended(children):
    # exit codes; as torchrun does, those that outlive a killed one are ended
    codes, until = {}, None
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child] < 0 and until is None:
                    until = time.monotonic() + spec["mercy"]
            elif until is not None and time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]

codes = []
for group in spec["groups"]:
    # as torchrun does, the store is held by who starts the ranks
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(group["ranks"]):
        child = os.fork()
        if child == 0:
            run(rank, group)
        children.append(child)
    codes.append(ended(children))
print(json.dumps(codes))
"""


def run_groups(
    groups: Sequence[tuple[int, Sequence[Mapping[str, Any]]]],
    *,
    machine: int | None = None,
    mercy: float = 60.0,
) -> tuple[list[list[int]], str]:
    """Exit codes of the ranks of each group, and what they said; a group is (ranks, jobs), a job
    what `train` takes, or with `call: resume` an `out` and its overrides.

    `machine`: ranks that count as on one machine. `mercy`: seconds after which a killed rank's
    others are killed. `signal_after: [rank, step, number]` in a job
    has a rank send itself a signal after a step; `prelude` is code that each rank runs before.
    """
    spec = {
        "mercy": mercy,
        "groups": [
            {
                "ranks": ranks,
                "jobs": list(jobs),
                "machine": min(ranks, machine or ranks),
            }
            for ranks, jobs in groups
        ],
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(spec)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    sys.stderr.write(done.stderr)  # what pytest shows of a failure
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


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


def assert_same_learning(wanted: Path, found: Path, *, steps: int) -> None:
    """The records, evaluations, row losses and weights of two runs are the same within rounding."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    np.testing.assert_allclose(losses(found), losses(wanted), rtol=2e-5)
    assert len(losses(wanted)) == steps
    assert losses(wanted)[-1] < losses(wanted)[0]
    for one, many in zip(records(wanted, "train"), records(found, "train"), strict=True):
        for key in ("documents", "tokens", "target_tokens", "epoch"):
            assert one[key] == many[key], key
        for key in ("grad_norm", "accuracy", "entropy", "logprob", "weight_sum"):
            np.testing.assert_allclose(many[key], one[key], rtol=2e-4, atol=1e-6)
    for one, many in zip(records(wanted, "eval"), records(found, "eval"), strict=True):
        np.testing.assert_allclose(many["nll"], one["nll"], rtol=2e-5)
    first, second = (pq.read_table(run / "rows.parquet").to_pydict() for run in (wanted, found))
    assert first["row"] == second["row"]
    np.testing.assert_allclose(second["loss"], first["loss"], rtol=2e-4)
    one, many = weights(wanted), weights(found)
    assert set(one) == set(many)
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=2e-4, atol=2e-5)
