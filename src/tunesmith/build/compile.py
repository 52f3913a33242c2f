"""Regional torch.compile of the decoder's layers, tried against the eager layers before it is
used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from tunesmith.build.microbatch_size import made_up_batch
from tunesmith.build.parallelize import decoder_layers
from tunesmith.checkpoint.rng import preserved_rng
from tunesmith.config.schema import Recipe
from tunesmith.distributed.oom import is_out_of_memory
from tunesmith.distributed.world import World
from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.compile import compile_layers, difference, restore_layers
from tunesmith.model.kernels import Replaced

TOKENS = {"cpu": 127, "other": 2039}
"""Of the trial: prime, so that no size of a model is taken for the number of tokens."""


def compile_model(
    recipe: Recipe, model: CausalLM, world: World, device: torch.device, *, tokens: int
) -> str | None:
    """Compile the layers if that is asked; what a start says of it.

    They are tried on at most `tokens`; where they compute something else, or can't be compiled, it
    is said and they stay as they are, on all ranks.
    """
    if recipe.device.compile == "none":
        return None
    tokens = min(tokens, TOKENS["cpu" if device.type == "cpu" else "other"])
    layers = []
    try:
        layers = decoder_layers(model)
        with preserved_rng():
            compile_layers(layers, deterministic=recipe.device.deterministic)
            apart = difference(model, layers, made_up_batch(model, tokens, device))
        problem = f"they differ by {apart:.1e} times what rounding explains"
    except Exception as error:  # of compilers, which raise whatever they like
        if is_out_of_memory(error):
            raise
        message = error.message if isinstance(error, ModelError) else str(error)
        apart, problem = float("inf"), (message.splitlines() or [type(error).__name__])[0]
    (worst,) = world.all_reduce_max([apart])
    if worst <= 1:
        return f"{len(layers)} layers, tried on {tokens:,} tokens"
    restore_layers(model)
    if apart <= 1:
        problem = "another rank can't"
    warnings.warn(f"the layers are not compiled: {problem}", stacklevel=2)
    return None


def computed_by(kernels: Replaced | None, compiled: str | None) -> dict[str, str]:
    """What machine.json keeps of it, and a resume must find the same."""
    return {
        "kernels": "torch" if kernels is None else kernels.text,
        "compile": "none" if compiled is None else compiled,
    }


def computing_lines(resolved: Mapping[str, Any]) -> list[str]:
    """The start's lines on kernels and compiled layers; none where plain torch computes."""
    plain = {"kernels": "torch", "compile": "none"}
    return [f"{key}: {resolved[key]}" for key, value in plain.items() if resolved[key] != value]
