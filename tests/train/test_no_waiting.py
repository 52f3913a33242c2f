"""Nothing inside a step asks its device for a value before the step's figures are read, once.

Torch's meta device stands in for a GPU: it runs whatever is queued and can't tell any value, so
each `item`, `nonzero`, `unique`, mask of unknown size or copy to the host is an error there, in our
code, in transformers' and in torch's own.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tiny import chat_inputs, tiny_folder
from tunesmith import transfer
from tunesmith.build.build import build
from tunesmith.build.job import Job, make_trainer
from tunesmith.build.optimizer import make_optimizer
from tunesmith.config.schema import Recipe
from tunesmith.model.attention.flex import block_mask
from tunesmith.model.attention.window import AttentionWindow
from tunesmith.model.kernels import float8
from tunesmith.train import step as step_module
from tunesmith.train.step import StepResult, train_step
from tunesmith.types import Chain, Layout

pytestmark = pytest.mark.usefixtures("torch_settings")

META = torch.device("meta")
LORA = {"adapter": {"kind": "lora", "rank": 4}}
KINDS: dict[str, dict[str, Any]] = {
    "nll": {},
    "smoothed, with terms": {"objective": {"label_smoothing": 0.1, "z_loss": 0.1, "entropy": 0.1}},
    "dft": {"objective": {"name": "dft"}},
    "eaft": {"objective": {"name": "eaft"}},
    "psft": {"objective": {"name": "psft", "outer_steps": 4}},
    "asft": {"objective": {"name": "asft"}},
    "asft, lora": {"objective": {"name": "asft"}, **LORA},
    "neftune": {"objective": {"neftune": 5.0}},
    "guesses": {"objective": {"scheduled_sampling": 0.9}},
    "lora": LORA,
    "dora": {"adapter": {"kind": "dora", "rank": 4}},
    "recomputed": {"device": {"gradient_checkpointing": "layers"}},
    "selective": {"device": {"gradient_checkpointing": "selective"}, **LORA},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "float8": {"model": {"float8": "rowwise"}},
    "not clipped": {"optim": {"max_grad_norm": None}},
    **{
        name: {"optim": {"name": name}, "model": {"dtype": "bfloat16"}}
        for name in ("adamw_8bit", "adafactor", "lion", "muon", "sgd")
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma2": {},
    "mixtral": {"objective": {"router_aux": 0.01}, "model": {"dtype": "bfloat16"}},
    "gpt_oss": {"model": {"dtype": "bfloat16"}},
}


def made(folder: Path, family: str, sections: dict[str, Any]) -> Job:
    """A job on the CPU."""
    inputs = chat_inputs(folder)
    tiny_folder(Path(inputs["model"]), family, num_hidden_layers=2)
    base: dict[str, dict[str, Any]] = {
        "model": {"name": inputs["model"], "dtype": "float32"},
        "data": {"train": inputs["data"]},
        "batch": {"documents": 6},
        "train": {"steps": 4},
        "device": {"kind": "cpu", "micro_tokens": 96},
    }
    keys = {**base, **sections}
    return build(Recipe.model_validate({k: {**base.get(k, {}), **v} for k, v in keys.items()}))


class Copies(TorchDispatchMode):
    """Where tensors of the host are copied to the device by something else than `transfer`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        source = args[1] if name == "copy_" else args[0] if args else None
        if isinstance(source, torch.Tensor) and source.device.type == "cpu":
            goes = kwargs.get("device") if name == "_to_copy" else None
            goes = args[0].device if name == "copy_" else goes
            stack = traceback.extract_stack()
            if goes == META and not any(f.filename == transfer.__file__ for f in stack):
                self.found.append(next(f"{f.filename}:{f.lineno}" for f in stack[::-1]
                                       if "_python_dispatch" not in f.filename
                                       and f.filename != __file__))  # fmt: skip
        return function(*args, **kwargs)


def step_on_meta(job: Job, folder: Path, monkeypatch: pytest.MonkeyPatch) -> StepResult:
    """A step whose device can't tell a value; the figures are made up."""
    reads: list[int] = []

    def told(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        assert all(tensor.device == META for tensor in tensors)
        reads.append(len(tensors))
        return [torch.ones(tensor.shape, dtype=tensor.dtype) for tensor in tensors]

    monkeypatch.setattr(step_module, "to_host", told)
    trainer = make_trainer(job, folder)
    number = 3
    # The old policy of psft is read before the first micro-batch of its outer batch.
    job.training.loss.begin(job.training.model, 0, trainer.planned, torch.device("cpu"))
    job.training.loss.begin(job.training.model, number, trainer.planned, torch.device("cpu"))
    for model in (job.training.model, job.training.loss.frozen):
        if model is not None:
            model.to(META)
    optimizer = make_optimizer(job.choices.recipe, job.training.model)
    documents, plans = trainer.planned(number)
    assert len(plans) > 2
    with Copies() as copies:
        result = train_step(
            job.training.model, optimizer, plans, job.training.loss, documents=len(documents),
            lr=1e-3,
            max_grad_norm=job.choices.recipe.optim.max_grad_norm, device=META,
        )  # fmt: skip
    assert copies.found == []
    assert len(reads) == 1
    assert optimizer.steps == 1
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "check_device", lambda _: None)
    monkeypatch.setattr(float8, "_cast", lambda _: float8.to_float8)  # not compiled
    job = made(tmp_path, "llama", KINDS[kind])
    try:
        result = step_on_meta(job, tmp_path, monkeypatch)
    finally:
        job.training.loss.close()
    assert result.loss_sum == len(result.micro_losses)  # a one for each micro-batch


@pytest.mark.parametrize("family", FAMILIES)
def test_so_does_a_step_of(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = made(tmp_path, family, FAMILIES[family])
    try:
        step_on_meta(job, tmp_path, monkeypatch)
    finally:
        job.training.loss.close()


@pytest.mark.parametrize("locality", [None, AttentionWindow(8, chunked=False)])
def test_nor_does_a_block_mask(locality: AttentionWindow | None) -> None:
    until, position = np.full(300, 300, np.int32), np.arange(300, dtype=np.int32)
    with Copies() as copies:
        block_mask(Layout((Chain(0, 300, ()),), until, position), locality, META)
    assert copies.found == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss: loss.item(),
        lambda loss: bool(loss.isfinite()),
        lambda loss: loss.cpu(),
        lambda loss: loss.reshape(1).tolist(),
        lambda loss: loss.reshape(1).nonzero(),
        lambda loss: loss.reshape(1).unique(),
        lambda loss: loss.reshape(1)[loss.reshape(1) > 0],
    ],
)
def test_what_asks_for_a_value_would_be_found(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = made(tmp_path, "llama", {})
    inner = job.training.loss.objective

    def curious(chunk: Any) -> torch.Tensor:
        losses = inner(chunk)
        if losses.device == META:
            ask(losses.sum())
        return losses

    job.training.loss.objective = curious
    with pytest.raises((RuntimeError, NotImplementedError)):
        step_on_meta(job, tmp_path, monkeypatch)


def test_a_copy_that_is_waited_for_would_be_found() -> None:
    with Copies() as copies:
        torch.zeros(3).to(META)
        transfer.to_device(np.zeros(3), META)
        torch.zeros(3, device=META).copy_(torch.ones(3))
    assert len(copies.found) == 2


def test_what_a_gpu_copies_is_pinned_if_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, values, other = torch.device("cuda"), torch.ones(3), torch.zeros(3)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: other)
    assert transfer.pinned(values, gpu) is other
    assert transfer.pinned(values, torch.device("cpu")) is values

    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    assert transfer.pinned(values, gpu) is values


def test_figures_come_back_as_they_are() -> None:
    tensors = [torch.tensor(1.25), torch.rand(3, 2), torch.zeros(0), torch.rand(4).double()]
    found = transfer.to_host([tensor.requires_grad_() for tensor in tensors])
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, tensors, strict=True)
    )
    assert not any(tensor.requires_grad for tensor in found)
