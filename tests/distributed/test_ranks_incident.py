"""Numbers that go wrong on one rank: all stop or skip the same step, and the incident has the rows
of every rank with the loss of each target.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gang import losses, records, run_groups, weights
from tiny import chat_rows, tiny_folder, write_jsonl

OPTIONS = [
    "data.shuffle=false",
    "train.epochs=1",
    "model.dtype=float32",
    "optim.lr=0.003",
    "optim.warmup=0",
    "batch.documents=4",
    "device.micro_tokens=64",
    "checkpoint.every=1",
    "checkpoint.keep=99",
]
POISON = """
import dataclasses
import torch
from tunesmith.train.loss import StepLoss

call = getattr(StepLoss.__call__, "whole", StepLoss.__call__)

def poisoned(self, model, plan, device):
    output = call(self, model, plan, device)
    worth = len(plan.owners.weight) and plan.weight.any()
    if self.step + 1 in {steps} and rank == {rank} and worth:
        bad = torch.full_like(output.token_loss, float("nan"))
        output = dataclasses.replace(output, loss_sum=output.loss_sum * {times}, token_loss={loss})
    return output

poisoned.whole = call
StepLoss.__call__ = poisoned
"""
UNEVEN = """
from tunesmith.optim.optimizer import Optimizer

whole = getattr(Optimizer.grad_norm, "whole", Optimizer.grad_norm)

calls = [0]

def uneven(self):
    calls[0] += 1
    norm = whole(self)
    return norm * float("nan") if calls[0] == 3 and rank == 1 else norm * (1 + rank)

uneven.whole = whole
Optimizer.grad_norm = uneven
"""
WHOLE = """
from tunesmith.optim.optimizer import Optimizer
from tunesmith.train.loss import StepLoss

StepLoss.__call__ = getattr(StepLoss.__call__, "whole", StepLoss.__call__)
Optimizer.grad_norm = getattr(Optimizer.grad_norm, "whole", Optimizer.grad_norm)
"""
GARBLED = "\u20ac\u00a5\u00df" * 40


def poison(*steps: int, rank: int, times: str = 'float("nan")', loss: str = "bad") -> str:
    return WHOLE + POISON.format(steps=steps, rank=rank, times=times, loss=loss)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], str]:
    folder = tmp_path_factory.mktemp("incidents")
    rows = chat_rows(120)
    rows[97]["messages"][2]["content"] = GARBLED
    inputs = {
        "model": str(tiny_folder(folder / "llama")),
        "data": str(write_jsonl(folder / "rows.jsonl", chat_rows(16))),
    }
    garbled = {**inputs, "data": str(write_jsonl(folder / "garbled.jsonl", rows))}

    def job(name: str, *options: str, prelude: str = WHOLE, given=inputs):
        overrides = [*OPTIONS, *options]
        return {**given, "out": str(folder / name), "overrides": overrides, "prelude": prelude}

    skip = "train.non_finite=skip"
    codes, said = run_groups(
        [
            (2, [
                job("skipped", skip, prelude=poison(2, 3, rank=1)),
                job("gradient", skip, prelude=WHOLE + UNEVEN),
                job("spiked", "log.spike_loss=1.5", "checkpoint.every=null", given=garbled),
                job("stopped", prelude=poison(3, rank=1)),
            ]),
            (2, [job("gradient-of-one", prelude=poison(2, rank=0, loss="output.token_loss"))]),
            (1, [job("alone", skip, prelude=poison(2, 3, rank=0))]),
        ]
    )  # fmt: skip
    return folder, codes, said


def incident(run: Path, step: int) -> dict:
    assert [file.name for file in (run / f"incident-{step}").iterdir()] == ["rows.json"]
    return json.loads((run / f"incident-{step}" / "rows.json").read_text())


def assert_whole(found: dict) -> None:
    """Text and the loss of each target of every row, whichever rank had it."""
    assert len(found["rows"]) == 4
    for row in found["rows"]:
        assert "You add numbers" in row["text"][0]
        told = [target["loss"] for target in row["targets"]]
        assert None not in told
        if isinstance(row["loss"], float):
            assert row["loss"] == pytest.approx(np.mean(told), rel=1e-5)
    assert {rank for row in found["rows"] for rank in row["ranks"]} == {0, 1}


def test_all_stop_at_the_step_of_one_rank(story) -> None:
    folder, codes, said = story
    assert codes[0] == [1, 1]
    assert said.count("the loss is nan") >= 1
    found = incident(folder / "stopped", 3)
    assert_whole(found)
    bad = [row for row in found["rows"] if row["loss"] == "nan"]
    assert bad == found["rows"][: len(bad)]
    assert 0 < len(bad) < 4
    assert all(1 in row["ranks"] for row in bad)
    assert all(row["ranks"] == [0] for row in found["rows"][len(bad) :])
    assert sorted(path.name for path in (folder / "stopped" / "checkpoints").iterdir()) == [
        "step-1",
        "step-2",
    ]


def test_a_gradient_alone_stops_them_too(story) -> None:
    folder, codes, _ = story
    assert codes[1] == [1, 1]
    found = incident(folder / "gradient-of-one", 2)
    assert found["grad_norm"] == "nan"
    assert_whole(found)


@pytest.mark.parametrize(("name", "steps"), [("skipped", [2, 3]), ("gradient", [3])])
def test_all_skip_the_same_steps(story, name: str, steps: list[int]) -> None:
    """In `gradient` the ranks don't even see the same norm."""
    folder, codes, _ = story
    assert codes[0] == [1, 1]  # of the last job, which is only run if those before went well
    done = records(folder / name, "event")
    assert [event["step"] for event in done if event["event"] == "skipped"] == steps
    for step in steps:
        assert_whole(incident(folder / name, step))
    taken = [record["step"] for record in records(folder / name, "train")]
    assert taken == [step for step in range(1, 5) if step not in steps]


def test_what_is_learned_around_skips_is_what_one_rank_learns(story) -> None:
    folder, codes, _ = story
    assert codes[2] == [0]
    np.testing.assert_allclose(losses(folder / "skipped"), losses(folder / "alone"), rtol=2e-5)
    one, many = weights(folder / "alone"), weights(folder / "skipped")
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=2e-4, atol=2e-5)


def test_a_spike_is_attributed_whichever_rank_had_the_row(story) -> None:
    folder, _, _ = story
    found = {e["step"]: e for e in records(folder / "spiked", "event") if e["event"] == "spike"}
    assert found[25]["rows"][0].endswith("garbled.jsonl:97")
    kept = incident(folder / "spiked", 25)
    worst = kept["rows"][0]
    assert GARBLED in worst["text"][0]
    assert None not in [target["loss"] for target in worst["targets"]]
    assert len(worst["ranks"]) >= 1
