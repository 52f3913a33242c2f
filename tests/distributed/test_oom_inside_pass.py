"""Memory that ends on one rank in the middle of a pass, where the others wait for what it would
have sent: slices of a sequence, or parts of layers. All go back together.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gang import losses, records, run_groups, weights
from tiny import chat_inputs
from tunesmith.build.parallelize import make_groups
from tunesmith.config.read import read_recipe
from tunesmith.distributed.peer_check import can_retry
from tunesmith.distributed.world import World

OPTIONS = [
    "train.steps=3",
    "model.dtype=float32",
    "optim.lr=0.003",
    "batch.documents=8",
    "device.micro_tokens=256",
]
NOISY = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2"]
LAYERS = "device.gradient_checkpointing=layers"
FITS = 64
TORN = """
import torch
from transformers.models.llama.modeling_llama import LlamaMLP
from tunesmith.train import step as steps
from tunesmith.train.trainer import Trainer

between = getattr(Trainer._between, "whole", Trainer._between)
mlp = getattr(LlamaMLP.forward, "whole", LlamaMLP.forward)
detached = getattr(steps._detached, "whole", steps._detached)
armed = [""]

def arming(self):
    between(self)
    wanted = {training} == self.training.model.training
    large = self.oom_retry.cut.micro_tokens > {fits} and self.step >= {step}
    armed[0] = {where!r} if rank in {ranks} and wanted and large else ""

def full(*_):
    torch.rand(7)  # what was drawn before the failure must not count
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

def torn(self, x):
    out = mlp(self, x)
    if armed[0] == "forward":
        full()
    if armed[0] == "backward" and out.requires_grad:
        out.register_hook(full)
    return out

def after(output):
    if armed[0] == "end":
        full()
    return detached(output)

arming.whole, torn.whole, after.whole = between, mlp, detached
Trainer._between, LlamaMLP.forward, steps._detached = arming, torn, after
"""


def torn(
    where: str,
    *,
    step: int = 0,
    ranks: tuple[int, ...] = (1,),
    training: bool = True,
    fits: int = FITS,
) -> str:
    """On some ranks micro-batches of more than `fits` tokens fail there, from a step on."""
    return TORN.format(where=where, step=step, ranks=ranks, training=training, fits=fits)


WHOLE = torn("nowhere")
CONTEXT, SHARD, TENSOR = (
    ["device.context_parallel=2"],
    ["device.shard=full"],
    ["device.tensor_parallel=2"],
)
Case = tuple[int, list[str], str]
FAST: dict[str, Case] = {
    "sequence": (2, [*CONTEXT, *NOISY], torn("backward")),
    "layers": (2, SHARD, torn("backward")),  # the head has a gradient by then
    "parts": (2, [*TENSOR, *NOISY], torn("backward")),
}
SLOW: dict[str, Case] = {
    **{
        f"sequence, {where}": (2, [*CONTEXT, LAYERS], torn(where, ranks=(0,)))
        for where in ("forward", "backward", "end")
    },
    **{
        f"layers, {where}": (2, [*SHARD, *NOISY], torn(where, ranks=(0,)))
        for where in ("forward", "backward", "end")
    },
    "layers, both": (2, [*SHARD, LAYERS], torn("backward", ranks=(0, 1))),
    **{
        f"both kinds, {where}": (2, [*CONTEXT, *SHARD], torn(where))
        for where in ("forward", "backward", "end")
    },
    **{
        f"parts, {where}": (2, [*TENSOR, LAYERS], torn(where, ranks=(0,)))
        for where in ("forward", "backward", "end")
    },
    "one of two copies": (4, TENSOR, torn("backward", ranks=(3,))),
    "one of two groups": (4, CONTEXT, torn("backward", ranks=(3,))),
    "two groups of layers": (4, [*CONTEXT, *SHARD], torn("forward", ranks=(2,))),
    "two machines": (4, ["device.shard=hybrid"], torn("backward", ranks=(2,))),
}
MIDDLE: dict[str, Case] = {
    "sequence": (2, CONTEXT, torn("forward", step=1)),
    "layers": (2, SHARD, torn("backward", step=1)),
}
EVALUATED: dict[str, Case] = {
    "sequence": (2, CONTEXT, torn("forward", training=False)),
    "layers": (2, SHARD, torn("forward", training=False, fits=128)),
}


def run_all(folder: Path, cases: dict[str, Case], *, against: str) -> Path:
    """Each case, and the same with memory for all: asked for as little as the other came down to,
    or for as much as it began with.
    """
    inputs: dict[str, Any] = chat_inputs(folder, held_out=5)
    groups: dict[int, list[Any]] = {}
    for name, (ranks, options, prelude) in cases.items():
        asked = [*OPTIONS, *options]
        job = {**inputs, "out": str(folder / name), "overrides": asked, "prelude": prelude}
        if against == "less":
            asked = [*asked, f"device.micro_tokens={FITS}"]
        other = {**inputs, "out": str(folder / f"{name}, {against}"), "overrides": asked}
        groups.setdefault(ranks, []).extend([job, {**other, "prelude": WHOLE}])
    codes, _ = run_groups(list(groups.items()), machine=2)
    assert codes == [[0] * ranks for ranks in groups]
    return folder


def events(run: Path) -> list[dict]:
    return [r for r in records(run, "event") if r["event"] == "out_of_memory"]


def assert_a_run_with_less(folder: Path, name: str) -> None:
    """Those that failed are named, and what is learned is to the bit what less gives."""
    found = events(folder / name)
    assert [event["step"] for event in found] == [1] * len(found)
    assert found[0]["micro_tokens_before"] == 256
    assert found[-1]["micro_tokens"] == FITS
    less = folder / f"{name}, less"
    assert not events(less)
    one, two = weights(folder / name), weights(less)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert losses(folder / name) == losses(less)
    assert len(losses(less)) == 3
    assert losses(less)[-1] < losses(less)[0]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("inside"), FAST, against="less")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("insides"), SLOW, against="less")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_all_go_back_from_inside_a_backward(fast: Path, name: str) -> None:
    assert_a_run_with_less(fast, name)
    assert {rank for event in events(fast / name) for rank in event["ranks"]} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_all_go_back_wherever_one_failed(slow: Path, name: str) -> None:
    assert_a_run_with_less(slow, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIDDLE)
def test_in_the_middle_it_is_the_undisturbed_run_within_rounding(name: str, tmp_path: Path) -> None:
    run_all(tmp_path, {name: MIDDLE[name]}, against="whole")
    found, wanted = tmp_path / name, tmp_path / f"{name}, whole"
    assert {event["step"] for event in events(found)} == {2}
    assert losses(found)[0] == losses(wanted)[0]
    np.testing.assert_allclose(losses(found), losses(wanted), rtol=2e-5)
    one, two = weights(found), weights(wanted)
    assert any(not torch.equal(one[key], two[key]) for key in one)
    for key, tensor in two.items():
        torch.testing.assert_close(one[key], tensor, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_is_done_again(name: str, tmp_path: Path) -> None:
    run_all(tmp_path, {name: EVALUATED[name]}, against="whole")
    found, wanted = tmp_path / name, tmp_path / f"{name}, whole"
    assert {event["step"] for event in events(found)} == {0}
    ours, theirs = (records(run, "eval") for run in (found, wanted))
    assert len(ours) == len(theirs) > 0
    for one, two in zip(ours, theirs, strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-5)


def test_ranks_of_gpus_do_not_meet_before_what_is_queued() -> None:
    """Each meeting on the host would wait for all that is queued."""
    assert can_retry(2, "cpu")
    assert not can_retry(2, "cuda")
    assert not can_retry(65, "cpu")
    recipe = read_recipe(
        None,
        ["model.name=m", "data.train=rows.jsonl", "device.context_parallel=2", "device.ranks=2"],
    )
    met = [make_groups(recipe, _Grouped(0, 2), kind).cp for kind in ("cpu", "cuda")]
    assert met == ["group", "nobody"]


class _Grouped(World):
    """Ranks that only tell how they would be grouped."""

    def with_context_parallel(self, size: int, *, peer_check: str, **_: Any) -> Any:  # type: ignore[override]
        return replace(self, cp=peer_check)
