"""Out of memory: a step is done again with less at a time, to the bit what less gives."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from fault_runs import KILL_AFTER, Place, assert_clean, assert_same_run, events, records
from safetensors.torch import load_file

from tunesmith.distributed.oom import is_out_of_memory
from tunesmith.train.oom_retry import smaller

NOISY = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2", "objective.neftune=1"]
TOO_LARGE = """
import torch
from tunesmith.train import {module} as module
from tunesmith.model.causal_lm import CausalLM

forward, calls = CausalLM.forward, [0]

def limited(self, batch, head, **options):
    calls[0] += 1
    out = forward(self, batch, head, **options)
    if calls[0] > {calls} and batch.input_ids.shape[-1] > {tokens} and {when}:
        torch.rand(7)  # what was drawn before the failure must not count
        raise {error}
    return out

CausalLM.forward = limited
"""
CUDA_SAYS = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")'
CPU_SAYS = (
    "RuntimeError(\"[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
    'allocate memory: you tried to allocate 1 bytes. Error code 12 (Cannot allocate memory)")'
)
ONEDNN_SAYS = 'RuntimeError("could not create a primitive")'

WEIGHTS = "model/model.safetensors"


def adapter(run: Path) -> bytes:
    return (run / "model" / "adapter_model.safetensors").read_bytes()


def too_large(
    tokens: int, *, calls: int = 0, error: str = CUDA_SAYS, when: str = "self.training"
) -> str:
    return TOO_LARGE.format(module="trainer", tokens=tokens, calls=calls, error=error, when=when)


@pytest.mark.parametrize("error", [CUDA_SAYS, CPU_SAYS, ONEDNN_SAYS], ids=["gpu", "cpu", "onednn"])
def test_from_the_first_step_it_is_a_run_with_less(
    place: Place, tmp_path: Path, error: str
) -> None:
    options = [*NOISY, "device.micro_tokens=512"]
    done = place.run(tmp_path / "run", options, prelude=too_large(140, calls=2, error=error))
    assert done.code == 0, done.said
    found = events(tmp_path / "run", "out_of_memory")
    assert found
    assert [event["step"] for event in found] == [1] * len(found)
    assert found[0]["micro_tokens_before"] == 512
    assert done.said.count("out of memory at step 1") == len(found)
    options[-1] = f"device.micro_tokens={found[-1]['micro_tokens']}"
    fewer = place.run(tmp_path / "less", options)
    assert fewer.code == 0, fewer.said
    assert adapter(tmp_path / "run") == adapter(tmp_path / "less")
    assert records(tmp_path / "run", "train") == records(tmp_path / "less", "train")


def test_in_the_middle_it_is_a_resume_with_less(place: Place, tmp_path: Path) -> None:
    """Without noise it is also the undisturbed run, within rounding."""
    options = ["device.micro_tokens=512", "checkpoint.keep=9"]
    done = place.run(tmp_path / "run", options, prelude=too_large(140, calls=9))
    assert done.code == 0, done.said
    found = events(tmp_path / "run", "out_of_memory")
    step = found[0]["step"]
    assert 2 <= step <= 7
    assert {event["step"] for event in found} == {step}
    assert place.run(tmp_path / "wanted", options).code == 0
    shutil.copytree(tmp_path / "wanted", tmp_path / "less")
    for later in range(step, 9):
        shutil.rmtree(tmp_path / "less" / "checkpoints" / f"step-{later}")
    less = place.resume(tmp_path / "less", [f"device.micro_tokens={found[-1]['micro_tokens']}"])
    assert less.code == 0, less.said
    assert_same_run(tmp_path / "run", tmp_path / "less")
    one, two = (load_file(tmp_path / run / WEIGHTS) for run in ("run", "wanted"))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_a_resume_keeps_what_was_come_down_to(place: Place, tmp_path: Path) -> None:
    options = [*NOISY, "device.micro_tokens=512"]
    too_much = too_large(140, calls=2)
    assert place.run(tmp_path / "wanted", options, prelude=too_much).code == 0
    killed = place.run(tmp_path / "run", options, prelude=too_much + KILL_AFTER.format(step=4))
    assert killed.code == -9
    done = place.resume(tmp_path / "run")  # with memory for all, that it must not use
    assert done.code == 0, done.said
    assert "exact to the bit" in done.said
    assert adapter(tmp_path / "run") == adapter(tmp_path / "wanted")


def test_an_evaluation_is_done_again(place: Place, undisturbed: Path, tmp_path: Path) -> None:
    options = ["device.micro_tokens=512"]
    done = place.run(
        tmp_path / "run", options, prelude=too_large(120, error=CPU_SAYS, when="not self.training")
    )
    assert done.code == 0, done.said
    found = events(tmp_path / "run", "out_of_memory")
    assert found
    assert {event["step"] for event in found} == {0}
    assert "in the evaluation after step 0" in done.said
    ours, theirs = (records(run, "eval") for run in (tmp_path / "run", undisturbed))
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-5)


def test_where_nothing_smaller_is_left_the_run_ends(place: Place, tmp_path: Path) -> None:
    done = place.run(tmp_path / "run", prelude=too_large(0, calls=8))
    assert_clean(done, code=1)
    assert "out of memory: a micro-batch of" in done.said
    assert "device.gradient_checkpointing=true" in done.said
    resumed = place.resume(tmp_path / "run")
    assert resumed.code == 0, resumed.said


def test_a_fault_that_returns_at_every_size_is_shown_at_the_end(
    place: Place, tmp_path: Path
) -> None:
    """oneDNN's words may stand for something other than memory: they must not be lost."""
    done = place.run(tmp_path / "run", prelude=too_large(0, calls=8, error=ONEDNN_SAYS))
    assert_clean(done, code=1)
    assert "could not create a primitive" in done.said


def test_weights_that_began_to_change_are_not_tried_again(place: Place, tmp_path: Path) -> None:
    prelude = """
from tunesmith.optim.optimizer import Optimizer
update, calls = Optimizer._update, [0]
def failing(self, *args, **options):
    calls[0] += 1
    if calls[0] == 30:
        raise MemoryError
    return update(self, *args, **options)
Optimizer._update = failing
"""
    done = place.run(tmp_path / "run", prelude=prelude)
    assert_clean(done, code=1)
    assert "out of memory" in done.said
    assert not events(tmp_path / "run", "out_of_memory")


def test_a_process_without_address_space_goes_on_with_less(place: Place, tmp_path: Path) -> None:
    """The limit is the system's own, and so is the refusal."""
    prelude = """
import resource
from pathlib import Path
from tunesmith.model.causal_lm import CausalLM
forward, calls = CausalLM.forward, [0]
def limited(self, batch, head, **options):
    calls[0] += 1
    if calls[0] == 6:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + 2**30  # threads and oneDNN reserve some
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    if calls[0] > 5 and batch.input_ids.shape[-1] > 140:
        import torch
        torch.empty(2**29)  # what the activations of a larger model would take
    return forward(self, batch, head, **options)
CausalLM.forward = limited
"""
    done = place.run(tmp_path / "run", ["device.micro_tokens=512"], prelude=prelude)
    assert done.code == 0, done.said
    assert events(tmp_path / "run", "out_of_memory")
    assert len(records(tmp_path / "run", "train")) == 8


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("could not create a primitive descriptor for the matmul primitive"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_halving_goes_on_until_a_micro_batch_is_smaller() -> None:
    assert smaller(4096, lambda tokens: min(tokens, 900)) == 512
    assert smaller(512, lambda tokens: max(tokens, 300)) == 256
    assert smaller(256, lambda tokens: max(tokens, 300)) is None
