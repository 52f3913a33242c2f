"""Data preparation of a run: sources, tokenizer with chat template, length limit, rendered
documents.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.build.inputs import UserObjects
from tunesmith.build.sampler import pack_prepared
from tunesmith.build.sources import make_sources, memory_source, prepare_all
from tunesmith.config.schema import Holdout, Recipe
from tunesmith.data.packing.packs import Packing
from tunesmith.data.preprocess.cache import discard
from tunesmith.data.preprocess.document_store import longest_paths
from tunesmith.data.preprocess.prepare import Prepared
from tunesmith.data.sources.hub import default_cache_folder
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import load_template, wrap_tokenizer
from tunesmith.data.templates.template import Template
from tunesmith.distributed.world import World
from tunesmith.errors import InputError, ModelError
from tunesmith.model.source import ModelSource
from tunesmith.train.job import EvalSet


@dataclass(frozen=True, slots=True)
class Data:
    """The rendered documents of a run, with their template and sources."""

    template: Template
    max_length: int
    sources: Sequence[Source]
    held_out: Mapping[str, Sequence[Source]] | Holdout | None
    prepared: Prepared
    eval_sets: Sequence[EvalSet]
    packing: Packing | None
    longest: int  # tokens of the longest path


def prepare_data(
    recipe: Recipe,
    objects: UserObjects,
    source: ModelSource | None,
    world: World,
    *,
    folders: Sequence[Path],
    faults_file: Path | None,
) -> Data:
    """Render every row. One rank does it, and the others read its result from the cache.

    Raises:
        DataError: with all bad rows, counted.
    """
    template = open_template(recipe, source, objects)
    max_length = resolve_max_length(recipe, template)
    train, held_out = data_sources(recipe, objects, folders)
    with preparation(recipe, world) as options:
        prepared, eval_sets = world.main_process_first(
            lambda: prepare_all(
                train, held_out, template, recipe.data,
                max_length=max_length, faults_file=faults_file, **options,
            )
        )  # fmt: skip
    packing = pack_prepared(recipe, prepared, max_length=max_length)
    longest = int(longest_paths(prepared.documents).max())
    return Data(template, max_length, train, held_out, prepared, eval_sets, packing, longest)


def open_template(recipe: Recipe, source: ModelSource | None, objects: UserObjects) -> Template:
    """The tokenizer with the chat template that the recipe asks for."""
    options: dict[str, Any] = {
        "template": recipe.data.template,
        "kwargs": recipe.data.template_kwargs,
    }
    if objects.tokenizer is not None:
        return wrap_tokenizer(objects.tokenizer, **options)
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


@contextmanager
def preparation(recipe: Recipe, world: World) -> Iterator[dict[str, Any]]:
    """Where prepared documents are kept, and how many processes prepare them.

    Several ranks without a cache share a folder that is gone afterwards; what a rank has mapped
    stays readable.
    """
    cache, processes = recipe.device.cache, recipe.device.num_proc
    folder = default_cache_folder() if cache is True else cache
    options: dict[str, Any] = {"processes": None if processes == "auto" else processes}
    if folder or world.is_single:
        yield {**options, "cache": Path(folder).expanduser() if folder else None}
        return
    made = tempfile.mkdtemp(prefix="tunesmith-") if world.is_main else None
    shared = Path(world.broadcast_object(made))
    try:
        yield {**options, "cache": shared}
    finally:
        discard(shared)


def data_sources(
    recipe: Recipe, objects: UserObjects, folders: Sequence[Path]
) -> tuple[list[Source], dict[str, list[Source]] | Holdout | None]:
    data = recipe.data
    if objects.rows is not None:
        train = memory_source(objects.rows, data, name="<data>")
    else:
        train = make_sources(data.train, data, folders=folders)
    if objects.eval_rows is not None:
        return train, {"eval": memory_source(objects.eval_rows, data, name="<eval>")}
    if isinstance(data.eval, dict):
        return train, {
            name: make_sources(s, data, folders=folders) for name, s in data.eval.items()
        }
    return train, data.eval
