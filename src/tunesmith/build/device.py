"""The compute device: choice of the device, determinism, CPU threads and random seeds."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from tunesmith.config.schema import Recipe
from tunesmith.errors import InputError


def choose_device(recipe: Recipe) -> torch.device:
    """The device the recipe names or the best one here; threads and determinism are set on the way.

    Raises:
        InputError: the named device is not here.
    """
    kinds = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    kind = recipe.device.kind
    if kind == "auto":
        kind = next((name for name, here in kinds.items() if here()), "cpu")
    elif kind != "cpu" and not kinds[kind]():
        raise InputError(
            f"torch finds no {kind} device here", where="device.kind", hint="device.kind=auto"
        )
    if recipe.device.threads != "auto":
        torch.set_num_threads(recipe.device.threads)
    if recipe.device.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(recipe.device.deterministic, warn_only=kind != "cpu")
    # Deterministic mode would also write NaN over every fresh buffer, a tenth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    return torch.device(kind)


def seed_everything(seed: int) -> None:
    """One seed for every generator that training may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
