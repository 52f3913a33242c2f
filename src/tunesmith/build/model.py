"""Find, size and load the model, after a check that training fits into memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tunesmith.build.inputs import UserObjects
from tunesmith.config.schema import Recipe
from tunesmith.data.templates.template import Template
from tunesmith.distributed.world import World
from tunesmith.model.load import (
    LoadedModel,
    choose_dtype,
    load_causal_lm,
    resolve_model,
    wrap_causal_lm,
)
from tunesmith.model.memory.estimate import MemoryEstimate, check_fits, free_memory, measure
from tunesmith.model.quantization.load import Quantization
from tunesmith.model.resize_embeddings import add_rows
from tunesmith.model.source import ModelSource


@dataclass(frozen=True, slots=True)
class FoundModel:
    """The model's files, and the memory that training it takes."""

    source: ModelSource | None  # None: the caller passed a model object
    size: MemoryEstimate | None
    ranks_per_copy: int


def find_model(
    recipe: Recipe,
    source: ModelSource | None,
    world: World,
    device: torch.device,
    *,
    ranks_per_copy: int,
) -> FoundModel:
    """Check that training fits the memory of the ranks that hold one copy of the model.

    Raises:
        InputError: it does not fit, with recipe lines that need less.
    """
    free = free_bytes(device, world) * ranks_per_copy
    size = check_memory(recipe, source, device, free=free)
    return FoundModel(source, size, ranks_per_copy)


def resolve_source(recipe: Recipe, objects: UserObjects) -> ModelSource | None:
    """The model's files on this machine; None where the caller passed a model object."""
    if objects.model is not None:
        return None
    return resolve_model(recipe.model.name, revision=recipe.model.revision)


def free_bytes(device: torch.device, world: World) -> int:
    """Free bytes for this rank. On a CPU the ranks of a machine share its memory."""
    free = free_memory(device)
    return free // world.local_size if device.type == "cpu" else free


def check_memory(
    recipe: Recipe, source: ModelSource | None, device: torch.device, *, free: int
) -> MemoryEstimate | None:
    """What training takes, if that is within `free` bytes."""
    if source is None:
        return None
    return check_fits(
        measure(source, trust_remote_code=recipe.model.trust_remote_code),
        dtype=choose_dtype(recipe.model.dtype, device).dtype,
        rank=_rank(recipe),
        kind=recipe.adapter.kind,
        rotation_size=recipe.adapter.rotation_size,
        quantization=chosen_quantization(recipe),
        optimizer=recipe.optim.name,
        paged=recipe.device.paged_optimizer,
        frozen_copy=bool(recipe.objective.kl),
        free=free,
        name=recipe.model.name,
    )


def chosen_quantization(recipe: Recipe) -> Quantization | None:
    """How the base is kept, None for a plain one."""
    if recipe.model.quantization == "none":
        return None
    return Quantization(recipe.model.quantization, double=recipe.model.double_quantization)


def _rank(recipe: Recipe) -> int | None:
    """None where the model's own parameters are trained."""
    whole = recipe.adapter.kind == "none" and recipe.adapter.continue_from is None
    return None if whole else recipe.adapter.rank


def load_model(
    recipe: Recipe,
    source: ModelSource | None,
    objects: UserObjects,
    device: torch.device,
    *,
    template: Template,
    home: torch.device | None = None,
) -> LoadedModel:
    """The model, with rows for the tokens that its template added to the tokenizer; in memory of
    `home` where it will come to `device` in parts.
    """
    loaded = _load(recipe, source, objects, device, home or device)
    padded = recipe.adapter.kind == "none"  # who loads an adapter counts the tokenizer's tokens
    added = [token.id for token in template.added]
    notes = [*loaded.notes, *add_rows(loaded.model, added, padded=padded)]
    adapter = replace(loaded.adapter, new_rows=tuple(sorted(added)))
    return replace(loaded, notes=notes, adapter=adapter)


def _load(
    recipe: Recipe,
    source: ModelSource | None,
    objects: UserObjects,
    device: torch.device,
    home: torch.device,
) -> LoadedModel:
    if source is None:
        return wrap_causal_lm(objects.model.to(home))
    dtype = recipe.model.dtype
    return load_causal_lm(
        source,
        dtype=dtype if home == device else choose_dtype(dtype, device).dtype,
        device=home,
        quantization=chosen_quantization(recipe),
        trust_remote_code=recipe.model.trust_remote_code,
    )
