"""Start one rank for each device of this machine, with torch's elastic launcher (torchrun)."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from tunesmith.distributed.env import launched_world_size
from tunesmith.errors import RecipeError, RunError


def ranks_to_start(kind: str, asked: int | str) -> int:
    """How many ranks a command should start here; 1 where it is a rank itself.

    `auto` is one for each GPU. On a CPU it is one, since a process uses all its cores.

    Raises:
        RecipeError: there are fewer GPUs than that, or the kind of device is for one process.
    """
    if (
        launched_world_size() > 1
        or asked == 1
        or (asked == "auto" and kind not in ("auto", "cuda"))
    ):
        return 1
    if kind in ("mps", "xpu"):
        raise RecipeError(
            f"{kind} runs in one process here", where="device.ranks", hint="device.ranks=1"
        )
    found = 0 if kind == "cpu" else _gpus()
    if asked == "auto":
        return max(1, found)
    count = int(asked)
    if found and count > found:
        raise RecipeError(
            f"{count} ranks need as many GPUs, and there are {found}",
            where="device.ranks",
            hint=f"device.ranks={found}",
        )
    return count


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def start(count: int, arguments: Sequence[str]) -> int:
    """Run `tunesmith` with these arguments on `count` ranks. Returns the exit code of the first
    rank that failed, or 0. Signals are forwarded to the ranks, which save a checkpoint and end.

    Raises:
        RunError: a rank was killed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # the ranks say themselves what happened to them
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "tunesmith", *arguments)
    except ChildFailedError as error:
        return _code(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _code(error: Any) -> int:
    rank, failure = error.get_first_failure()
    code = int(failure.exitcode)
    if code > 0:
        return code
    raise RunError(
        f"rank {rank} was ended by {signal.Signals(-code).name}",
        hint="`tunesmith resume RUN` goes on from the last checkpoint",
    )
