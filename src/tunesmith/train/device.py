"""Where a run runs: the device, determinism, seeds, and how much goes through at a time."""

from __future__ import annotations

import ctypes
import os
import random

import numpy as np
import torch

from tunesmith.config.schema import Recipe
from tunesmith.errors import InputError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.checkpointing import Mode, as_mode, set_checkpointing
from tunesmith.model.memory import MemoryEstimate, choose_micro_tokens

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's mallopt(3)."""


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


def keep_freed_memory() -> None:
    """Make glibc keep big buffers that were freed, so that the next step does not fault them in.

    By its default it gives every buffer above a few megabytes back to the system, and each page of
    the next one costs a fault. Elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 2**30)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def seed_everything(seed: int) -> None:
    """One seed for every generator that training may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def fit_device(
    recipe: Recipe,
    model: CausalLM,
    device: torch.device,
    *,
    longest: int,
    room: int,
    held: MemoryEstimate | None,
) -> tuple[int, Mode]:
    """Tokens at a time, and how activations are recomputed: as asked, or as room requires.

    Raises:
        InputError: activations are to be offloaded from a CPU.
        ModelError: the architecture can't recompute.
    """
    if recipe.device.activation_offload:
        if device.type == "cpu":
            raise InputError(
                "on a CPU activations are in the host's memory already",
                where="device.activation_offload",
                hint="device.activation_offload=false, or device.gradient_checkpointing=layers",
            )
        model.offload = True
    left = max(room - (held.total if held else 0), room // 8)
    choice = choose_micro_tokens(
        model.config,
        dtype=next(model.base.parameters()).dtype,
        device=device,
        room=left,
        longest=longest,
    )
    asked = recipe.device.gradient_checkpointing
    checkpointing = choice.checkpointing if asked == "auto" else as_mode(asked)
    set_checkpointing(model.base, checkpointing)
    tokens = choice.tokens if recipe.device.micro_tokens == "auto" else recipe.device.micro_tokens
    return tokens, checkpointing
