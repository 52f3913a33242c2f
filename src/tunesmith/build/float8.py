"""Products in float8: which recipes and models they go with."""

from __future__ import annotations

import torch

from tunesmith.config.schema import Recipe
from tunesmith.distributed.world import World
from tunesmith.errors import RecipeError
from tunesmith.model.adapters.targets import candidates
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.kernels import float8
from tunesmith.model.source import ModelSource

ADAPTERS = ("none", "lora", "rslora")
"""Kinds beside which the map that they are on multiplies as without them."""


def check_float8(
    recipe: Recipe, world: World, source: ModelSource | None, device: torch.device
) -> None:
    """Refuse what products in float8 are not shown to go with, before anything is loaded.

    Raises:
        RecipeError: names the key and what to give instead.
        ModelError: the device has no such products.
    """
    if recipe.model.float8 == "none":
        return
    adapter, objective = recipe.adapter, recipe.objective
    goes_on = adapter.continue_from is not None or (
        source is not None and source.adapter_folder is not None
    )
    for where, asked, why, instead in (
        ("model.quantization", recipe.model.quantization != "none",
         "a quantised base is multiplied as plain weights", "none"),
        ("adapter.kind", adapter.kind not in ADAPTERS,
         "this kind changes the weight itself", "lora"),
        ("adapter.continue_from", goes_on, "this model comes with an adapter", "null"),
        ("objective.name", objective.name in ("psft", "asft"),
         "what it compares with is computed without them", "dft"),
        ("objective.kl", bool(objective.kl), "the base is computed without them", "null"),
        ("device.shard", recipe.device.shard != "none", "parts of weights have other rows", "none"),
        ("device.tensor_parallel", world.tp.size > 1, "parts of weights have other rows", "1"),
        ("device.context_parallel", world.cp.size > 1, "that has not been shown", "1"),
    ):  # fmt: skip
        if asked:
            raise RecipeError(
                f"does not go with products in float8: {why}",
                where=where,
                hint=f"{where}={instead}, or model.float8=none",
            )
    float8.check_device(device)


def use_float8(recipe: Recipe, model: CausalLM) -> list[str]:
    """Let the decoder's linear maps multiply in float8 if the recipe says so; what is said of it.

    Embedding, head, routers and tensors of experts stay as they are.

    Raises:
        RecipeError: there is no such map.
    """
    if recipe.model.float8 == "none":
        return []
    found = candidates(model)
    done, left = float8.use_float8(model.base, found.linear)
    if not done:
        raise RecipeError(
            f"{model.config.model_type} has no linear map that could multiply in float8",
            where="model.float8",
            hint="model.float8=none",
        )
    inside = sum(model.base.get_submodule(name).weight.numel() for name in done)
    share = inside / sum(parameter.numel() for parameter in model.base.parameters())
    said = f"float8: {len(done)} linear maps, {share:.0%} of the weights, multiply in 8 bits while "
    said += "training; evaluation and what is exported do not"
    if left:
        multiple = float8.MULTIPLE
        said += f"; {len(left)} are left, of sizes that {multiple} does not divide: {left[0]}"
    if found.experts:
        said += "; tensors of experts stay as they are"
    return [said]
