"""Memory that ends on one rank alone: all go back together, or all end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gang import losses, records, run_groups, weights
from tiny import chat_inputs

pytestmark = pytest.mark.slow  # processes of several ranks

OPTIONS = [
    "train.steps=4",
    "model.dtype=float32",
    "optim.lr=0.003",
    "batch.documents=8",
    "device.micro_tokens=512",
    "checkpoint.every=2",
]
NOISY = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2", "objective.neftune=1"]
TOO_LARGE = """
import torch
from tunesmith.train.trainer import Trainer

between = getattr(Trainer._between, "whole", Trainer._between)

def limited(self):
    between(self)
    if rank not in {ranks} or self.training.model.training != {training} or self.step < {step}:
        return
    if self.oom_retry.cut.micro_tokens > {fits}:
        torch.rand(7)  # what was drawn before the failure must not count
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

limited.whole = between
Trainer._between = limited
"""
WHOLE = """
from tunesmith.train.trainer import Trainer
Trainer._between = getattr(Trainer._between, "whole", Trainer._between)
"""

NOBODY_ASKS = """
from tunesmith.distributed import peer_check
peer_check.MAX_RANKS = 1
"""


def too_large(
    *, fits: int = 128, step: int = 0, ranks: tuple[int, ...] = (1,), training: bool = True
) -> str:
    """Memory for micro-batches of `fits` tokens from a step on, counted from 0."""
    return WHOLE + TOO_LARGE.format(fits=fits, step=step, ranks=ranks, training=training)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return chat_inputs(tmp_path_factory.mktemp("inputs"), held_out=9)


@pytest.fixture(scope="module")
def story(inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], str]:
    folder = tmp_path_factory.mktemp("memory")

    def job(name: str, *options: str, prelude: str = WHOLE):
        overrides = [*OPTIONS, *options]
        return {**inputs, "out": str(folder / name), "overrides": overrides, "prelude": prelude}

    codes, said = run_groups(
        [
            (2, [
                job("first", *NOISY, prelude=too_large()),
                job("less", *NOISY, "device.micro_tokens=128"),
                job("middle", prelude=too_large(step=2)),
                job("whole"),
                job("evaluation", prelude=too_large(fits=256, ranks=(0,), training=False)),
            ]),
            (2, [job("nothing-left", "train.steps=1", prelude=too_large(fits=0))]),
            (2, [job("sharded", "device.shard=full", prelude=NOBODY_ASKS + too_large(step=2))]),
            (2, [{"call": "resume", "out": str(folder / "sharded"), "overrides": []}]),
        ]
    )  # fmt: skip
    return folder, codes, said


def events(run: Path, name: str) -> list[dict]:
    return [record for record in records(run, "event") if record["event"] == name]


def test_from_the_first_step_it_is_a_run_with_less_to_the_bit(story) -> None:
    folder, codes, _ = story
    assert codes[0] == [0, 0]
    found = events(folder / "first", "out_of_memory")
    assert [event["step"] for event in found] == [1] * len(found)
    assert [event["ranks"] for event in found] == [[1]] * len(found)
    assert found[0]["micro_tokens_before"] == 512
    assert found[-1]["micro_tokens"] == 128
    one, two = weights(folder / "first"), weights(folder / "less")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(folder / "first") == losses(folder / "less")


def test_in_the_middle_it_is_the_undisturbed_run_within_rounding(story) -> None:
    folder, codes, _ = story
    assert codes[0] == [0, 0]
    found = events(folder / "middle", "out_of_memory")
    assert [event["step"] for event in found] == [3] * len(found)
    assert found[-1]["micro_tokens"] == 128
    np.testing.assert_allclose(losses(folder / "middle"), losses(folder / "whole"), rtol=2e-5)
    one, two = weights(folder / "middle"), weights(folder / "whole")
    assert any(not torch.equal(one[name], two[name]) for name in one)
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=2e-4, atol=2e-5)


def test_an_evaluation_is_done_again_by_all(story) -> None:
    folder, codes, _ = story
    assert codes[0] == [0, 0]
    found = events(folder / "evaluation", "out_of_memory")
    assert found
    assert {(event["step"], *event["ranks"]) for event in found} == {(0, 0)}
    ours, theirs = (records(folder / name, "eval") for name in ("evaluation", "whole"))
    for one, two in zip(ours, theirs, strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-5)


def test_where_nothing_smaller_is_left_all_end_with_one_message(story) -> None:
    folder, codes, said = story
    assert codes[1] == [1, 1]
    assert said.count("out of memory: a micro-batch of") == 1
    assert "device.gradient_checkpointing=true" in said
    assert not (folder / "nothing-left" / "model").exists()


def test_ranks_that_do_not_ask_end_at_once_and_the_next_start_takes_less(story) -> None:
    folder, codes, said = story
    assert codes[2:] == [[1, 1], [0, 0]]
    assert said.count("out of memory on rank 1 with device.micro_tokens=512") == 1
    run = folder / "sharded"
    now = json.loads((run / "less-memory.json").read_text())["micro_tokens"]
    assert now < 512
    assert f"goes on with device.micro_tokens={now}" in said
    meta = next((run / "checkpoints" / "step-4").glob("*.json")).read_text()
    assert f'"micro_tokens": {now}' in meta
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4]
    np.testing.assert_allclose(losses(run), losses(folder / "whole"), rtol=2e-5)
