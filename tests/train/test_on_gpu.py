"""Runs on a GPU against the same ones on its host's CPU: losses of every step and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from gang import losses, records
from tiny import chat_inputs, tiny_folder
from tunesmith.model.kernels import float8
from tunesmith.train import step as step_module
from tunesmith.train import trainer

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
    **{name: [f"optim.name={name}"] for name in ("muon", "adafactor", "lion", "sgd")},
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


@pytest.mark.parametrize("kind", ["full", "lora", "recomputed", "eaft", "asft", "muon"])
def test_a_step_is_not_waited_for_before_its_end(
    kind: str, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises at whatever makes the host wait, but for the one reading of the figures."""
    real, read, steps = trainer.train_step, step_module.to_host, []

    def reading(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        torch.cuda.set_sync_debug_mode("default")
        found = read(tensors)
        torch.cuda.set_sync_debug_mode("error")
        return found

    def strict(*args: Any, **keywords: Any) -> Any:
        if not steps:  # kernels are compiled and tried in the first
            steps.append(1)
            return real(*args, **keywords)
        torch.cuda.set_sync_debug_mode("error")
        try:
            steps.append(1)
            return real(*args, **keywords)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(step_module, "to_host", reading)
    monkeypatch.setattr(trainer, "train_step", strict)
    run(given, tmp_path / "run", GPU, "eval.every=null", *KINDS[kind])
    assert len(steps) == 6


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_products_in_float8_are_those_of_the_emulation(
    kind: str, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float8.check_device(torch.device("cuda"))
    monkeypatch.setattr(float8, "check_device", lambda _: None)
    options = ["model.float8=rowwise", *KINDS[kind]]
    one = run(given, tmp_path / "cpu", "device.kind=cpu", *options)
    two = run(given, tmp_path / "gpu", GPU, *options)
    # A number that lies between two of float8 may come out as either.
    assert losses(two) == pytest.approx(losses(one), rel=0.02)


def test_a_run_is_the_same_bits_again(given: dict[str, str], tmp_path: Path) -> None:
    one, two = (run(given, tmp_path / name, GPU) for name in ("one", "two"))
    assert losses(one) == losses(two)
