"""Which parameters are trained: all, a pattern, the top layers, or a peft adapter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.config.schema import Recipe
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.adapters import (
    AdapterSpec,
    AdapterState,
    AttachedAdapter,
    adapter_fields,
    add_adapter,
    freeze,
    full_report,
    has_adapter,
    load_adapter,
    refuse_plain_base,
)
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import resolve_model
from tunesmith.model.source import ModelSource

SPEC = (
    "kind", "rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "rotation_size",
    "svd_iterations",
)  # fmt: skip


def choose_trained(
    recipe: Recipe,
    model: CausalLM,
    loaded: AdapterState,
    unreached: Collection[str] = (),
) -> AttachedAdapter:
    """Put the recipe's adapter on the model, or freeze what it leaves out. `loaded` is the state
    that loading the model returned; `unreached` are parameters that no text reaches, which get no
    adapter.
    """
    adapter = recipe.adapter
    start = adapter_source(recipe)
    if start is not None:
        loaded = replace(loaded, of_quantized=_load(model, start).of_quantized)
    refuse_plain_base(model, loaded)
    if adapter.kind != "none" or start is not None:
        spec = AdapterSpec(**{name: getattr(adapter, name) for name in SPEC})
        asked = adapter.model_fields_set & set(SPEC)
        asked -= {"kind"} if spec.kind == "none" else set()
        attached = add_adapter(model, spec, loaded, asked=asked, unreached=unreached)
    elif adapter.parameters is not None or adapter.top_layers is not None:
        _refuse_adapted(model)
        report = freeze(model, parameters=adapter.parameters, top_layers=adapter.top_layers)
        attached = AttachedAdapter(report, loaded)
    else:
        attached = AttachedAdapter(full_report(model), loaded)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32  # micro-batches are added up in float32
    return attached


def adapter_source(recipe: Recipe) -> ModelSource | None:
    """The adapter that the recipe goes on with.

    Raises:
        RecipeError: it is none, or belongs to another base than the recipe's.
    """
    name = recipe.adapter.continue_from
    if name is None:
        return None
    where = "adapter.continue_from"
    try:
        source = resolve_model(name)
        base = resolve_model(recipe.model.name, revision=recipe.model.revision)
    except ModelError as error:
        raise RecipeError(
            error.message, where=f"{where}: {error.where}", hint=error.hint
        ) from error
    if source.adapter_folder is None:
        raise RecipeError(
            f"{name} is a whole model, no adapter", where=where, hint=f"model.name={name}"
        )
    if base.adapter_folder is not None or base.folder != source.folder:
        raise RecipeError(
            f"{name} is an adapter for {source.folder}, and model.name is {recipe.model.name}",
            where=where,
            hint=f"model.name={source.folder}",
        )
    return source


def resolved_adapter(
    recipe: Recipe, model: CausalLM, state: AdapterState, source: ModelSource | None
) -> dict[str, Any]:
    """What of the section is now known: the fields of an adapter that the model came with."""
    start = recipe.adapter.continue_from
    came = start is not None or (source is not None and source.adapter_folder is not None)
    if not came or (start is None and recipe.adapter.kind == "none"):
        return {}
    known = set(type(recipe.adapter).model_fields)
    fields = {key: value for key, value in adapter_fields(model, state).items() if key in known}
    return fields if start is None else {**fields, "continue_from": _absolute(start)}


def noisy_adapter(model: CausalLM) -> bool:
    """True where dropout is on, so that layouts agree in expectation only."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def adapter_lines(
    recipe: Recipe, model: CausalLM, state: AdapterState, *, shared: bool
) -> list[str]:
    """What a start says about the adapter, in a line or two; nothing about full fine-tuning."""
    lines: list[str] = []
    if has_adapter(model):
        fields = {k: v for k, v in adapter_fields(model, state).items() if v not in ({}, None, 0)}
        parts = [f"adapter: {fields.pop('kind')}", *(f"{k} {v}" for k, v in fields.items())]
        if recipe.adapter.lr_ratio is not None:
            parts.append(f"B matrices learn at {recipe.adapter.lr_ratio:g} times the rate")
        if recipe.adapter.continue_from is not None:
            parts.append(f"goes on with {recipe.adapter.continue_from}")
        lines.append(", ".join(parts))
    if noisy_adapter(model):
        how = "shared, as asked" if shared else "not shared"
        lines.append(f"with dropout layouts agree in expectation only, prefixes are {how}")
    return lines


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _load(model: CausalLM, start: ModelSource) -> AdapterState:
    _refuse_adapted(model)
    assert start.adapter_folder is not None
    adapted, state = load_adapter(model.base, start.adapter_folder)
    model.replace_model(adapted)
    return state


def _refuse_adapted(model: CausalLM) -> None:
    if has_adapter(model):
        raise RecipeError(
            "the model comes with an adapter already",
            where="model.name",
            hint="name its base, or merge it first: tunesmith merge",
        )
