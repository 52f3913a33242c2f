"""Which errors say that memory ran out."""

from __future__ import annotations

import pytest
import torch

from tunesmith.distributed import oom


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_known_errors(error: BaseException) -> None:
    assert oom.is_out_of_memory(error)


def test_other_errors_are_not() -> None:
    assert not oom.is_out_of_memory(RuntimeError("shape '[64, 1]' is invalid"))
    assert not oom.is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("limited", [True, False])
def test_onednn_without_memory_under_a_limit(
    limited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN says the same of an operation that it does not have, which must stay an error."""
    monkeypatch.setattr(oom, "_limited", lambda: limited)
    assert oom.is_out_of_memory(RuntimeError("could not create a primitive")) is limited
