"""The model on its device, once it is sure to fit."""

from __future__ import annotations

import torch

from tunesmith.config.schema import Recipe
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import choose_dtype, load_causal_lm, wrap_causal_lm
from tunesmith.model.memory import MemoryEstimate, check_fits, free_memory, measure
from tunesmith.model.source import ModelSource
from tunesmith.train.assemble.given import Given


def check_memory(
    recipe: Recipe, source: ModelSource | None, device: torch.device
) -> MemoryEstimate | None:
    if source is None:
        return None
    return check_fits(
        measure(source, trust_remote_code=recipe.model.trust_remote_code),
        dtype=choose_dtype(recipe.model.dtype, device).dtype,
        rank=recipe.adapter.rank if recipe.adapter.kind == "lora" else None,
        free=free_memory(device),
        name=recipe.model.name,
    )


def load_model(
    recipe: Recipe, source: ModelSource | None, given: Given, device: torch.device
) -> CausalLM:
    if source is None:
        return wrap_causal_lm(given.model.to(device))
    return load_causal_lm(
        source,
        dtype=recipe.model.dtype,
        device=device,
        trust_remote_code=recipe.model.trust_remote_code,
    )
