"""Steps that are planned while the one before them is worked on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tunesmith
from gang import records
from tiny import chat_inputs
from tunesmith.build.build import build
from tunesmith.config.schema import Recipe
from tunesmith.train import figures, trainer
from tunesmith.train.loss import StepLoss
from tunesmith.train.microbatches import Ahead, Planned, own_plans, step_plans

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
    plan, call, read = Ahead._plan, StepLoss.__call__, figures.to_host

    def planned(self: Ahead, number: int) -> Planned:
        events.append(f"plan {number}")
        return plan(self, number)

    def called(*args: Any) -> Any:
        if events[-1:] != ["loss"]:  # of several micro-batches one is enough
            events.append("loss")
        return call(*args)

    def told(tensors: Any) -> Any:
        events.append("read")
        return read(tensors)

    monkeypatch.setattr(Ahead, "_plan", planned)
    monkeypatch.setattr(StepLoss, "__call__", called)
    monkeypatch.setattr(figures, "to_host", told)
    run(tmp_path)
    wanted = ["plan 0"]
    for number in range(1, STEPS):
        wanted += ["loss", f"plan {number}", "read"]
    assert events == [*wanted, "loss", "read"]


def test_what_fails_ahead_fails_in_its_own_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Ahead._plan

    def planned(self: Ahead, number: int) -> Planned:
        if number == 2:
            raise OSError("the data is gone")
        return plan(self, number)

    monkeypatch.setattr(Ahead, "_plan", planned)
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
    own = trainer.Trainer(job, tmp_path, [])
    own._ahead.step(0)
    own._ahead.prepare(1)
    before = len(own._ahead.step(1).plans)
    own._ahead.prepare(1)
    job.micro_tokens = 64
    documents, plans = own.planned(1)
    fresh = step_plans(documents, job.ranks, costs=job.costs, micro_tokens=64, share=job.share)
    assert len(plans) == len(fresh) > before
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(plans, fresh, strict=True))
    mine = own_plans(fresh, job.ranks, costs=job.costs)
    assert [plan.tokens for plan in own._ahead.step(1).own] == [plan.tokens for plan in mine]
    job.loss.close()
