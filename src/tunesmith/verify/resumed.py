"""P5: a run that is resumed from a checkpoint continues bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.build.job import Job, make_trainer
from tunesmith.checkpoint.folder import TENSOR_FILES, load_checkpoint
from tunesmith.verify.outcome import Outcome
from tunesmith.verify.workload import STEPS

HALF = STEPS // 2


def run_through(job: Job, folder: Path) -> None:
    """The whole short run, saved at half and at its end."""
    make_trainer(job, folder).fit()


def resume_bitwise(build: Callable[[], Job], folder: Path) -> Outcome:
    """Go on from the half-way checkpoint in `folder` with a job built anew, and compare its end
    with the end there: weights, optimizer, random state, losses of rows.
    """
    job = build()
    resumed_folder = folder.with_name(f"{folder.name}-again")
    trainer = make_trainer(job, resumed_folder)
    trainer.restore(folder / "checkpoints" / f"step-{HALF}")
    trainer.fit()
    ends = [
        load_checkpoint(place / "checkpoints" / f"step-{STEPS}")
        for place in (folder, resumed_folder)
    ]
    pairs = [
        (
            {f"{part}: {name}": tensor for name, tensor in tensors.items()}
            for part, tensors in zip(
                TENSOR_FILES, (end.model, end.optimizer, end.rng.tensors), strict=True
            )
        )
        for end in ends
    ]
    straight, resumed = ({k: v for part in parts for k, v in part.items()} for parts in pairs)
    difference, of = _largest(straight, resumed)
    random = all(
        getattr(ends[0].rng, name) == getattr(ends[1].rng, name) for name in ("numpy", "python")
    )
    if not random and difference == 0:
        difference, of = float("inf"), "the random state"
    return Outcome(
        promise="P5",
        name="resume bitwise",
        compared=f"weights, optimizer and random state after {STEPS} steps, resumed after {HALF}",
        oracle="the same run without a stop",
        counts={
            "tensors": len(straight),
            "values": sum(tensor.numel() for tensor in straight.values()),
        },
        difference=difference,
        tolerance=0.0,
        measure="absolute",
        verdict="holds" if difference == 0 else "fails",
        note=f"largest in {of}" if of else "",
        advice="" if difference == 0 else "a resume of this run is not exact: keep "
        "device.deterministic=true and the same number of threads, or don't rely on resuming",
    )  # fmt: skip


def _largest(one: dict[str, Tensor], two: dict[str, Tensor]) -> tuple[float, str]:
    """The largest absolute difference and where; tensors on one side only differ without end."""
    alone = sorted(one.keys() ^ two.keys())
    if alone:
        return float("inf"), alone[0]
    worst, of = 0.0, ""
    for name, tensor in one.items():
        other = two[name]
        if tensor.shape == other.shape and tensor.dtype == other.dtype:
            if torch.equal(tensor, other):
                continue
            apart = (tensor.double() - other.double()).abs().max().item()
            value = apart if apart > 0 else float("inf")  # NaN, or a zero of another sign
        else:
            value = float("inf")
        if value > worst or not of:
            worst, of = value, name
    return worst, of
