"""Activation memory: tokens per micro-batch, and the activation checkpointing that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.model.layers import layer_values
from tunesmith.model.memory.estimate import show
from tunesmith.model.ops.activation_checkpointing import Mode, as_mode

MODES: tuple[Mode, ...] = ("none", "selective", "layers")
"""From the fastest to the one that needs least."""

_RECOMPUTED = {
    "none": "nothing recomputed",
    "layers": "all recomputed",
    "selective": "all but products and attention recomputed",
}
_TOKENS = {"cpu": (512, 1024), "other": (1024, 32768)}  # least and most, by kind of device


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that a micro-batch takes while it runs: `fixed`, and `per_token` of it."""

    per_token: float
    fixed: float = 0.0
    measured: bool = False  # else computed from the config

    @property
    def usable(self) -> float:
        """The share of free memory that may be planned with: a formula may be far off."""
        return 0.8 if self.measured else 0.5

    def tokens(self, room: int) -> int:
        """How many tokens fit into this room."""
        return max(0, int((room * self.usable - self.fixed) / self.per_token))


@dataclass(frozen=True, slots=True)
class MicroChoice:
    """Tokens that go through the device at a time, and which activations are recomputed to make
    room for them.
    """

    tokens: int
    checkpointing: Mode
    reason: str


def tokens_range(device: torch.device | str) -> tuple[int, int]:
    """The least and most that are ever chosen. A CPU gains nothing from more than a thousand at a
    time: its caches are small.
    """
    return _TOKENS["cpu" if torch.device(device).type == "cpu" else "other"]


def activation_bytes(
    config: Any, *, dtype: torch.dtype, checkpointing: bool | Mode = "none"
) -> int:
    """Bytes of activations that the backward of one token keeps.

    A layer keeps about 8 vectors of the hidden size (its input, two norms' inputs and outputs,
    query, key and value, attention output, residuals) and 4 of each width of the feed-forward used
    by a token (gate, up, activation, product). One that recomputes keeps its input, under
    `selective` also about 6 results of products at the hidden size and 2 at the feed-forward's;
    the layer that is being recomputed is counted once.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    widths = _active_widths(text)
    layers = [8 * hidden + 4 * width for width in widths]
    mode = as_mode(checkpointing)
    if mode == "none":
        return sum(layers) * dtype.itemsize
    whole = sum(layers)
    if mode == "selective":
        kept = sum(7 * hidden + 2 * width for width in widths)
    else:
        every = mode if isinstance(mode, int) else 1
        kept = whole - sum(layer - hidden for layer in layers[::every])
    return (kept + max(layers, default=0)) * dtype.itemsize


def _active_widths(text: Any) -> list[int]:
    """Of each layer: the feed-forward's width that one token goes through."""
    names = ("intermediate_size", "moe_intermediate_size", "num_experts_per_tok")
    layers = zip(*(layer_values(text, name) for name in names), strict=True)
    usual = 4 * text.hidden_size
    return [int(expert or dense or usual) * int(n or 1) for dense, expert, n in layers]


def computed_cost(config: Any, *, dtype: torch.dtype) -> Callable[[Mode], Cost]:
    """The cost of each mode by `activation_bytes`."""
    return lambda mode: Cost(activation_bytes(config, dtype=dtype, checkpointing=mode))


def choose_micro_tokens(
    cost: Callable[[Mode], Cost],
    *,
    device: torch.device | str,
    room: int,
    longest: int,
    modes: Sequence[Mode] = MODES,
) -> MicroChoice:
    """`device.micro_tokens: auto` and `device.gradient_checkpointing: auto` from the bytes left for
    activations (`room`) and the longest path of the data.

    The first of `modes` is taken in which the longest path fits, and as many tokens as then fit, a
    power of two.
    """
    least, most = tokens_range(device)
    mode, found, fits = modes[0], Cost(1.0), 0
    for mode in modes:
        found = cost(mode)
        fits = found.tokens(room)
        if fits >= max(longest, least):
            break
    tokens = int(max(min(fits, most), least))
    tokens = 2 ** (tokens.bit_length() - 1)
    needed = found.fixed + found.per_token * max(tokens, longest)
    text = (
        f"{show(int(needed))} for activations{'' if found.measured else ' by formula'}, "
        f"{show(room)} free, {_RECOMPUTED.get(str(mode), f'every {mode} layers recomputed')}"
    )
    return MicroChoice(tokens, mode, text)
