"""Fused kernels (Liger) for norms and gated units: when they are used."""

from __future__ import annotations

import warnings

import torch

from tunesmith.config.schema import Recipe
from tunesmith.errors import RecipeError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.kernels import NAME, Provider, Replaced, find_liger, use_kernels


def check_kernels(recipe: Recipe) -> None:
    """Refuse kernels that are insisted on and not installed, before anything is loaded.

    Raises:
        RecipeError: says what to install.
    """
    if recipe.device.kernels == NAME:
        find_liger(insist=True)


def choose_kernels(recipe: Recipe, model: CausalLM, device: torch.device) -> Replaced | None:
    """Replace what kernels compute right, as the recipe says; None where none are used.

    Raises:
        RecipeError: they are insisted on and can't be used.
    """
    insist = recipe.device.kernels == NAME
    found = _found(recipe, device, insist=insist)
    if found is None:
        return None
    dtype = model.head.weight.dtype
    return use_kernels(model.decoder, found, dtype=dtype, device=device, insist=insist)


def _found(recipe: Recipe, device: torch.device, *, insist: bool) -> Provider | None:
    plain = recipe.device.kernels == "torch" or recipe.device.compile != "none"
    if not insist and (plain or device.type != "cuda"):
        return None
    try:
        return find_liger(insist=insist)
    except RecipeError as error:
        if insist:
            raise
        warnings.warn(error.message, stacklevel=2)
        return None
