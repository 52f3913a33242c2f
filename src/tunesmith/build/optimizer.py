"""The optimizer over the trained parameters, with learning-rate factors by group."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tunesmith.config.schema import Recipe
from tunesmith.errors import RecipeError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.optim import (
    SGD,
    Adafactor,
    AdamW,
    AdamW8bit,
    Lion,
    Muon,
    Optimizer,
    Pages,
    undecayed,
)


def make_optimizer(
    recipe: Recipe,
    model: CausalLM,
    parts: Mapping[str, Tensor] | None = None,
    *,
    folder: Path | None = None,
) -> Optimizer:
    """The optimizer over the model's parameters, or over a rank's `parts` of them by name.

    `folder`: on a disk, for state that is paged; None: the current one.
    """
    optim = recipe.optim
    named = list(model.named_parameters() if parts is None else parts.items())
    shared: dict[str, Any] = {
        "weight_decay": optim.weight_decay,
        "undecayed": undecayed(model),
        "lr_factors": lr_factors(recipe, model),
        "pages": Pages(folder or Path.cwd()) if recipe.device.paged_optimizer else None,
    }
    adam: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps, **shared}
    if optim.name == "adamw_8bit":
        return AdamW8bit(named, **adam)
    if optim.name == "muon":
        return Muon(named, matrices=matrices(model), momentum=optim.momentum, **adam)
    if optim.name == "lion":
        return Lion(named, betas=optim.betas, **shared)
    if optim.name == "sgd":
        return SGD(named, momentum=optim.momentum, **shared)
    if optim.name == "adafactor":
        return Adafactor(named, **shared)
    return AdamW(named, **adam)


def matrices(model: CausalLM) -> frozenset[str]:
    """Names of what Muon makes orthogonal: matrices, stacked ones too, but embedding and head."""
    excluded = undecayed(model) | _within(model, "head") | _within(model, "embeddings")
    return frozenset(n for n, p in model.named_parameters() if p.ndim >= 2 and n not in excluded)


def lr_factors(recipe: Recipe, model: CausalLM) -> dict[str, float]:
    """What the learning rate of a parameter is multiplied by, by its name, where that isn't 1.

    LoRA+ (Hayou et al., arXiv 2402.12354) lets the B matrices learn faster than the A matrices.
    Factors of several groups that a parameter belongs to multiply.

    Raises:
        RecipeError: a group has no trained parameter, or is no expression.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    factors: dict[str, float] = {}
    if recipe.adapter.lr_ratio is not None:
        factors = {n: recipe.adapter.lr_ratio for n in trained if ".lora_B." in n}
    for group, factor in recipe.optim.lr_factors.items():
        members = _members(model, group, trained)
        if not members:
            raise RecipeError(
                f"no trained parameter is in the group {group}",
                where=f"optim.lr_factors.{group}",
                hint="a head tied to the embedding belongs to embeddings; "
                "expressions are searched for in the parameters' names, such as "
                f"{trained[0] if trained else 'none'}",
            )
        for name in members:
            factors[name] = factors.get(name, 1.0) * factor
    return factors


def _members(model: CausalLM, group: str, trained: list[str]) -> list[str]:
    if group in ("embeddings", "head"):
        inside = _within(model, group)
        return [name for name in trained if name in inside]
    pattern = r"\.lora_(B|embedding_B)\." if group == "lora_b" else group
    try:
        return [name for name in trained if re.search(pattern, name)]
    except re.error as error:
        raise RecipeError(
            f"{group} is no regular expression: {error}", where=f"optim.lr_factors.{group}"
        ) from error


def _within(model: CausalLM, group: str) -> frozenset[str]:
    """Names of the parameters of all embeddings, or of the head where it isn't one of them."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    wanted = embeddings
    if group == "head":
        wanted = {id(p) for p in model.head.parameters()} - embeddings
    return frozenset(name for name, p in model.named_parameters() if id(p) in wanted)
