"""Runs on a GPU against the same ones on its host's CPU: losses of every step and evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunesmith
from gang import losses, records
from tiny import chat_inputs, tiny_folder

pytestmark = pytest.mark.gpu
GPU = "device.kind=cuda"
COMMON = [
    "train.steps=6", "optim.lr=0.003", "batch.documents=4", "device.micro_tokens=128",
    "model.dtype=float32", "eval.every=3",
]  # fmt: skip
KINDS = {
    "full": [],
    "lora": ["adapter=lora", "adapter.rank=4"],
    "recomputed": ["device.gradient_checkpointing=layers"],
    "offloaded": ["device.gradient_checkpointing=layers", "device.activation_offload=true"],
    "paged": ["device.paged_optimizer=true"],
    "eaft": ["objective=eaft"],
    "asft": ["objective=asft", "adapter=lora", "adapter.rank=4"],
    "muon": ["optim.name=muon"],
}
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")
ROUNDING = 2e-3
"""Of a loss, relative, after six steps in float32 whose kernels add in another order."""


@pytest.fixture(scope="module", params=FAMILIES)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp(request.param)
    inputs = chat_inputs(folder, held_out=2)
    tiny_folder(Path(inputs["model"]), request.param)
    return inputs


def run(given: dict[str, str], out: Path, *options: str) -> Path:
    tunesmith.train(out=out, overrides=[*COMMON, *options], progress=False, **given)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_is_the_cpus(kind: str, given: dict[str, str], tmp_path: Path) -> None:
    learned = [option for option in KINDS[kind] if not option.startswith("device.")]
    one = run(given, tmp_path / "cpu", "device.kind=cpu", *learned)
    two = run(given, tmp_path / "gpu", GPU, *KINDS[kind])
    assert losses(two) == pytest.approx(losses(one), rel=ROUNDING)
    held = [[record["nll"] for record in records(out, "eval")] for out in (one, two)]
    assert held[1] == pytest.approx(held[0], rel=ROUNDING)


def test_a_run_is_the_same_bits_again(given: dict[str, str], tmp_path: Path) -> None:
    one, two = (run(given, tmp_path / name, GPU) for name in ("one", "two"))
    assert losses(one) == losses(two)
