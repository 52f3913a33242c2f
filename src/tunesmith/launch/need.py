"""Devices that a job needs, from the memory estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tunesmith.build.model import chosen_quantization
from tunesmith.config.schema import Recipe
from tunesmith.errors import RecipeError
from tunesmith.model.memory.activations import activation_bytes, tokens_range
from tunesmith.model.memory.estimate import MemoryEstimate, estimate, measure, read_config, show
from tunesmith.model.source import ModelSource, resolve_model

_USABLE = 0.9
"""Share of a device's memory that is planned with; the rest is the libraries' own."""
_MOST = 1 << 14


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of the states of a job, of a micro-batch on a device, and the devices for both."""

    states: MemoryEstimate
    working: int
    memory: int  # of one device
    shard: str
    devices: int

    def on(self, devices: int, *, per_node: int) -> int:
        """Bytes that each of so many devices holds."""
        parts = {"none": 1, "full": devices, "hybrid": min(devices, per_node)}[self.shard]
        return math.ceil(self.states.total / parts) + self.working

    def line(self) -> str:
        """What was computed, for people."""
        return (
            f"{self.states.parameters / 1e6:,.0f}M parameters, states {self.states}; a micro-batch "
            f"about {show(self.working)}; device.shard={self.shard} on devices of "
            f"{show(self.memory)}: {self.devices} or more"
        )


def devices_needed(recipe: Recipe, *, memory: int, per_node: int) -> Need:
    """The least number of devices with `memory` bytes each that hold the job, computed from the
    model's config.

    A micro-batch is taken at the largest size that is chosen by itself, or the recipe's, with every
    layer recomputed unless the recipe says otherwise. Under `hybrid` a node holds the whole model.

    Raises:
        RecipeError: no number of devices holds it under this `device.shard`.
        ModelError: the model is not here, so that nothing can be computed.
    """
    source = resolve_model(recipe.model.name, revision=recipe.model.revision)
    size = measure(source, trust_remote_code=recipe.model.trust_remote_code)
    dtype = torch.float32 if recipe.model.dtype == "float32" else torch.bfloat16
    adapted = recipe.adapter.kind != "none" or recipe.adapter.continue_from is not None
    states = estimate(
        size,
        dtype=dtype,
        rank=recipe.adapter.rank if adapted else None,
        kind=recipe.adapter.kind if recipe.adapter.kind != "none" else "lora",
        rotation_size=recipe.adapter.rotation_size,
        quantization=chosen_quantization(recipe),
        optimizer=recipe.optim.name,
    )
    need = Need(states, _working(recipe, source, dtype), memory, recipe.device.shard, 0)
    usable = int(memory * _USABLE)
    counts = [*range(1, per_node + 1), *range(2 * per_node, _MOST, per_node)]
    for devices in counts:
        if need.on(devices, per_node=per_node) <= usable:
            return Need(states, need.working, memory, recipe.device.shard, devices)
    hint = {
        "none": "device.shard=full spreads the states over the devices; adapter=lora needs less",
        "hybrid": "device.shard=full spreads them over all nodes; adapter=lora needs less",
    }.get(recipe.device.shard, "give devices with more memory, or a smaller device.micro_tokens")
    raise RecipeError(
        f"states of {show(states.total)} and a micro-batch of {show(need.working)} do not fit on "
        f"devices of {show(memory)} with device.shard={recipe.device.shard}",
        where=recipe.model.name,
        hint=hint,
    )


def _working(recipe: Recipe, source: ModelSource, dtype: torch.dtype) -> int:
    asked, mode = recipe.device.micro_tokens, recipe.device.gradient_checkpointing
    tokens = tokens_range("cuda")[1] if asked == "auto" else asked
    config = read_config(source, trust_remote_code=recipe.model.trust_remote_code)
    whole = mode in ("none", False)
    return tokens * activation_bytes(
        config, dtype=dtype, checkpointing="none" if whole else "layers"
    )
