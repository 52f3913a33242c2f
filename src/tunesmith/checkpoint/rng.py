"""The states of all random generators of a run (torch CPU and CUDA, numpy, random) as one value."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RngState:
    """States of torch (CPU and every CUDA device), numpy's global generator and `random`."""

    tensors: dict[str, Tensor]  # "cpu", "cuda.0", ...: uint8
    numpy: list[Any]  # name, key words, position, has_gauss, cached_gaussian
    python: list[Any]  # version, words, next gaussian


def capture_rng() -> RngState:
    """The states now, as values that JSON and safetensors hold exactly."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        tensors.update({f"cuda.{index}": state for index, state in enumerate(states)})
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, inner, gauss = random.getstate()
    return RngState(
        tensors,
        [name, [int(word) for word in words], int(position), int(has_gauss), float(cached)],
        [version, list(inner), gauss],
    )


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What is drawn inside counts for nothing afterwards."""
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Let a rank draw numbers in this step that no other rank or step draws, and draws again on a
    resume.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def restore_rng(state: RngState) -> None:
    """Go on drawing where the states were captured; devices that are not here are passed over."""
    torch.set_rng_state(state.tensors["cpu"])
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in state.tensors:
                torch.cuda.set_rng_state(state.tensors[f"cuda.{index}"], index)
    name, words, position, has_gauss, cached = state.numpy
    np.random.set_state((name, np.array(words, dtype=np.uint32), position, has_gauss, cached))
    version, inner, gauss = state.python
    random.setstate((version, tuple(inner), gauss))
