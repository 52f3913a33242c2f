"""Time of a step by category (attention, linear layers, optimizer, ...), from torch's profiler.

A step runs once under torch's profiler. Each operation's own time goes to the part that what it is
called from belongs to, or else it itself, by name: forward and backward alike, since the backward
of an operation carries its name. On an accelerator its kernels' time is counted in place of the
host's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from tunesmith.build.job import Job
from tunesmith.estimate.workload import documents_of, planned
from tunesmith.train.step import Optimizer, train_step

LINEAR = "linear maps of the decoder"
ATTENTION = "attention"
LIGHT = "norms, rotations, activations"
HEAD = "head and embedding"
OPTIMIZER = "optimizer, sums of gradients"
PLANNING = "documents and their layout"
OTHER = "other"
PARTS = (LINEAR, ATTENTION, LIGHT, HEAD, OPTIMIZER, PLANNING, OTHER)

_REGION = "tunesmith bench: "
_WORDS = (
    (HEAD, ("_headloss", "_widen", "embedding", "index_select", "indexselect")),
    (ATTENTION, ("_flashtree", "attention", "flash", "flex", "varlen", "softmax", "bmm")),
    (OPTIMIZER, ("accumulategrad",)),
    (
        LINEAR,
        ("_wideproduct", "_product", "addmm", "::mm", "mmbackward", "linear", "_grouped_mm",
         "_scaled_mm"),
    ),
)  # fmt: skip


def part_of(name: str) -> str | None:
    """The part an operation belongs to by its name; None for the light ones, which have many."""
    if name.startswith(_REGION):
        return name.removeprefix(_REGION)
    lowered = name.lower()
    return next((part for part, words in _WORDS if any(w in lowered for w in words)), None)


class _Regions:
    """An optimizer whose work is one region of the profile."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    def grad_norm(self) -> Tensor:
        with record_function(_REGION + OPTIMIZER):
            return self.inner.grad_norm()

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        with record_function(_REGION + OPTIMIZER):
            self.inner.step(lr, grad_scale)

    def zero_grad(self) -> None:
        with record_function(_REGION + OPTIMIZER):
            self.inner.zero_grad()


def breakdown(job: Job, step: int) -> dict[str, float]:
    """Seconds of each part of a step, counted from 0; they add up to the time it took.

    The profiler itself takes some of it. The model's weights are as before: the rate is zero.
    """
    started = time.perf_counter()
    documents, plans = documents_of(job, step), planned(job, step)
    job.training.loss.begin(
        job.training.model,
        step,
        lambda n: (documents_of(job, n), planned(job, n)),
        job.training.device,
    )
    planning = time.perf_counter() - started
    on_host = job.training.device.type == "cpu"
    activities = [ProfilerActivity.CPU, *([] if on_host else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as recorded:
        started = time.perf_counter()
        train_step(
            job.training.model, _Regions(job.training.optimizer), plans, job.training.loss,
            documents=len(documents), lr=0.0,
            max_grad_norm=job.choices.recipe.optim.max_grad_norm, device=job.training.device,
        )  # fmt: skip
        if not on_host:
            torch.accelerator.synchronize(job.training.device)
        seconds = time.perf_counter() - started
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    parts[PLANNING] = planning
    for part, self_time in _self_seconds(recorded.events() or (), on_host=on_host):
        parts[part] += self_time
    parts[OTHER] += planning + seconds - sum(parts.values())
    return parts


def _inside(outer: str | None, name: str) -> str | None:
    """The part of an operation called from one of `outer`.

    Layers that recompute do so inside the backward of the first product that asks for what they
    kept; so a product's part is only for what has none of its own.
    """
    part = part_of(name)
    if outer in (None, LINEAR):
        return part or outer
    return outer


def _self_seconds(events: Iterable[Any], *, on_host: bool) -> Iterable[tuple[str, float]]:
    """For each operation its part and its own time; the time of a region itself is Python's."""
    known: dict[int, str | None] = {}

    def part(event: Any) -> str | None:
        waiting = []
        while event is not None and id(event) not in known:
            waiting.append(event)
            event = event.cpu_parent
        found = None if event is None else known[id(event)]
        for one in reversed(waiting):
            found = known[id(one)] = _inside(found, one.name)
        return found

    for event in events:
        if "CPU" not in str(event.device_type) or event.name.startswith("ProfilerStep"):
            continue
        self_time = event.self_cpu_time_total if on_host else event.self_device_time_total
        yield part(event) or LIGHT, self_time / 1e6
