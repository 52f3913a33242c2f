"""Steps that are planned while the one before them is worked on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tunesmith
from gang import records
from tiny import chat_inputs
from tunesmith.build.build import build
from tunesmith.build.job import make_trainer
from tunesmith.config.schema import Recipe
from tunesmith.train import step
from tunesmith.train.loss import StepLoss
from tunesmith.train.microbatches import PlannedStep, StepPlanner, local_plans, step_plans

pytestmark = pytest.mark.usefixtures("torch_settings")
STEPS = 4


def run(folder: Path) -> Path:
    out = folder / "run"
    tunesmith.train(
        out=out,
        overrides=[f"train.steps={STEPS}", "batch.documents=4", "device.micro_tokens=96",
                   "model.dtype=float32"],
        progress=False, **chat_inputs(folder),
    )  # fmt: skip
    return out


def test_the_next_step_is_planned_after_the_last_micro_batch_and_before_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    plan, call, read = StepPlanner._plan, StepLoss.__call__, step.to_host

    def planned(self: StepPlanner, number: int, cut: Any) -> PlannedStep:
        events.append(f"plan {number}")
        return plan(self, number, cut)

    def called(*args: Any) -> Any:
        if events[-1:] != ["loss"]:  # of several micro-batches one is enough
            events.append("loss")
        return call(*args)

    def told(tensors: Any) -> Any:
        events.append("read")
        return read(tensors)

    monkeypatch.setattr(StepPlanner, "_plan", planned)
    monkeypatch.setattr(StepLoss, "__call__", called)
    monkeypatch.setattr(step, "to_host", told)
    run(tmp_path)
    wanted = ["plan 0"]
    for number in range(1, STEPS):
        wanted += ["loss", f"plan {number}", "read"]
    assert events == [*wanted, "loss", "read"]


def test_what_fails_ahead_fails_in_its_own_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = StepPlanner._plan

    def planned(self: StepPlanner, number: int, cut: Any) -> PlannedStep:
        if number == 2:
            raise OSError("the data is gone")
        return plan(self, number, cut)

    monkeypatch.setattr(StepPlanner, "_plan", planned)
    with pytest.raises(OSError, match="the data is gone"):
        run(tmp_path)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2]


def test_a_plan_for_other_micro_tokens_is_not_used(tmp_path: Path) -> None:
    inputs = chat_inputs(tmp_path)
    job = build(
        Recipe.model_validate({
            "model": inputs["model"], "data": inputs["data"], "batch": {"documents": 6},
            "train": {"steps": 3}, "device": {"kind": "cpu", "micro_tokens": 256},
        })
    )  # fmt: skip
    own = make_trainer(job, tmp_path)
    cut = job.microbatching
    own._planner.step(0, cut)
    own._planner.prepare(1, cut)
    before = len(own._planner.step(1, cut).plans)
    own._planner.prepare(1, cut)
    own.oom_retry.cut = replace(cut, micro_tokens=64)
    documents, plans = own.planned(1)
    fresh = step_plans(
        documents,
        job.training.world,
        work_model=job.microbatching.work,
        micro_tokens=64,
        share_prefixes=job.microbatching.share_prefixes,
    )
    assert len(plans) == len(fresh) > before
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(plans, fresh, strict=True))
    mine = local_plans(fresh, job.training.world, work_model=job.microbatching.work)
    assert [plan.tokens for plan in own._planner.step(1, own.oom_retry.cut).local] == [
        plan.tokens for plan in mine
    ]
    job.training.loss.close()
