"""The workload of a verification: the recipe reduced to a few rows and steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.build.build import build
from tunesmith.build.job import Job
from tunesmith.config.schema import Recipe
from tunesmith.config.values import Duration
from tunesmith.errors import InputError
from tunesmith.types import Document

STEPS = 4
"""Optimizer steps of the run that is resumed; its first half is saved."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is looked at."""

    documents: int = 6  # in one step
    rows: int = 64  # of each source
    tokens: int = 768  # longest path of a document that goes through the model


def bounded(recipe: Recipe, bounds: Bounds, *, untrained: bool = False) -> Recipe:
    """The recipe on the first rows of its sources, for a few steps, without held-out data,
    trackers and caches; all else is as it was. `untrained`: rows are not joined to packs either.
    """
    sections = [
        section.model_copy(update={"limit": min(section.limit or bounds.rows, bounds.rows)})
        for section in recipe.data.train
    ]
    parts = {
        "data": {"train": sections, "eval": None},
        "batch": {"documents": min(recipe.batch.documents or 32, bounds.documents), "tokens": None},
        "train": {"epochs": None, "steps": STEPS, "result": "last"},
        "checkpoint": {"every": Duration(STEPS // 2, "steps"), "keep": 2},
        "eval": {"samples": 0, "every": None},
        "log": {"to": []},
        "device": {"cache": False, "num_proc": 1},
    }
    if untrained:
        parts["batch"] |= {"packing": "none", "pack_tokens": None}
    changed = {
        name: getattr(recipe, name).model_copy(update=update) for name, update in parts.items()
    }
    return recipe.model_copy(update=changed)


def shortened(recipe: Recipe, longest: int) -> Recipe:
    """The recipe without documents that have a longer path."""
    limit = recipe.data.max_length
    limit = longest if limit == "auto" else min(limit, longest)
    data = recipe.data.model_copy(update={"max_length": limit, "too_long": "drop"})
    batch = recipe.batch
    if batch.packing != "none":
        size = min(batch.pack_tokens or limit, limit)
        batch = batch.model_copy(update={"pack_tokens": size})
    return recipe.model_copy(update={"data": data, "batch": batch})


def build_precise(recipe: Recipe, bounds: Bounds, folders: Sequence[Path]) -> tuple[Job, str]:
    """The job with float32 weights, or with the recipe's own where those don't fit; and which.

    Its products are never in float8, which round too much for two ways to be held to each other.
    """
    short = bounded(recipe, bounds, untrained=True)
    short = short.model_copy(update={"model": short.model.model_copy(update={"float8": "none"})})
    if recipe.model.dtype != "float32":
        wide = short.model.model_copy(update={"dtype": "float32"})
        try:
            return build(short.model_copy(update={"model": wide}), folders=folders), "float32"
        except InputError:
            pass  # too large, or not to be had so; the recipe's own may be
    job = build(short, folders=folders)
    return job, job.choices.recipe.model.dtype


def chosen_documents(job: Job, bounds: Bounds) -> list[Document]:
    """The first documents with short enough paths, or the shortest of all."""
    documents = [job.data.documents[number] for number in range(len(job.data.documents))]
    short = [document for document in documents if document.longest_path <= bounds.tokens]
    if short:
        return short[: bounds.documents]
    return [min(documents, key=lambda document: document.longest_path)]


def tolerance_of(job: Job) -> float:
    """How far float rounding alone may take a gradient, relative to its norm."""
    narrow = any(
        p.dtype in (torch.bfloat16, torch.float16) for p in job.training.model.parameters()
    )
    if narrow:
        return 8e-2
    return 1e-4 if job.training.device.type == "cpu" else 5e-3  # float32 on a GPU may mean TF32
