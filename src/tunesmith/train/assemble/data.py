"""The sources, the tokenizer with its template, the length limit and the order of the documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.schema import Holdout, Recipe
from tunesmith.data.cache import default_cache_folder
from tunesmith.data.sources import Source
from tunesmith.data.template import Template, load_template, wrap_tokenizer
from tunesmith.errors import InputError, ModelError
from tunesmith.model.source import ModelSource
from tunesmith.train.assemble.given import Given
from tunesmith.train.sources import make_sources, memory_source


def open_template(recipe: Recipe, source: ModelSource | None, given: Given) -> Template:
    """The tokenizer with the chat template that the recipe asks for."""
    options: dict[str, Any] = {
        "template": recipe.data.template,
        "kwargs": recipe.data.template_kwargs,
    }
    if given.tokenizer is not None:
        return wrap_tokenizer(given.tokenizer, **options)
    if source is None:
        raise InputError(
            "a model given as an object needs its tokenizer",
            where="tokenizer",
            hint="tokenizer=...",
        )
    return load_template(
        source.tokenizer_folder, trust_remote_code=recipe.model.trust_remote_code, **options
    )


def resolve_max_length(recipe: Recipe, template: Template) -> int:
    """`data.max_length`, with `auto` as the model's context.

    Raises:
        ModelError: auto, and the model names no context.
    """
    if recipe.data.max_length != "auto":
        return recipe.data.max_length
    if template.context_length is None:
        raise ModelError(
            "the model names no context length",
            where="data.max_length",
            hint="data.max_length=2048",
        )
    return template.context_length


def preparation(recipe: Recipe) -> dict[str, Any]:
    """Where prepared documents are kept, and how many processes prepare them."""
    cache, processes = recipe.device.cache, recipe.device.prepare_processes
    folder = default_cache_folder() if cache is True else cache
    return {
        "cache": Path(folder).expanduser() if folder else None,
        "processes": None if processes == "auto" else processes,
    }


def data_sources(
    recipe: Recipe, given: Given, folders: Sequence[Path]
) -> tuple[list[Source], dict[str, list[Source]] | Holdout | None]:
    data = recipe.data
    if given.rows is not None:
        train = memory_source(given.rows, data, name="<data>")
    else:
        train = make_sources(data.train, data, folders=folders)
    if given.eval_rows is not None:
        return train, {"eval": memory_source(given.eval_rows, data, name="<eval>")}
    if isinstance(data.eval, dict):
        return train, {
            name: make_sources(s, data, folders=folders) for name, s in data.eval.items()
        }
    return train, data.eval
