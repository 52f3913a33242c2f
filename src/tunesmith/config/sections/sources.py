"""Data sources in the recipe: a path or a mapping with weight, columns, split and the like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    PlainSerializer,
    WithJsonSchema,
)

from tunesmith.config.fields import Number
from tunesmith.config.sections.base import Count, Section
from tunesmith.config.values import Holdout, parse_columns, parse_holdout

Columns = Annotated[dict[str, str], BeforeValidator(parse_columns)]
"""Our name of a column to the data's name of it."""


class SourceSection(Section):
    """One source of rows."""

    path: str = Field(
        min_length=1,
        description="file, folder, pattern (data/*.jsonl), or org/name of a data set on the hub",
    )
    subset: str | None = Field(
        default=None, min_length=1, description="of a hub data set or folder with several"
    )
    split: str | None = Field(
        default=None, min_length=1, description="of a hub data set or folder; train where it has it"
    )
    revision: str | None = Field(
        default=None, min_length=1, description="branch, tag or commit of a hub data set"
    )
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "tokens",
        "segments",
        "preference",
        "prompt_completion",
        "alpaca",
        "text",
        "templated_text",
    ] = Field(default="auto", description="shape of the rows")
    columns: Columns | None = Field(
        default=None, description="our name: the data's name; overrides data.columns"
    )
    weight: Annotated[Number, Field(gt=0)] | None = Field(
        default=None,
        description="its part of the mixture, in relation to the other sources' weights",
    )
    epochs: Annotated[Number, Field(gt=0)] | None = Field(
        default=None,
        description="how often a pass over the data holds it; with weights: when it is exhausted",
    )
    limit: Count | None = Field(default=None, ge=1, description="use only the first rows")


def parse_sources(value: Any) -> Any:
    """A list of source mappings from a path, a mapping, or a list of either."""
    if value is None:
        return []
    items = cast("list[Any]", value) if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def parse_eval(value: Any) -> Any:
    """None, a Holdout (`2%`, `200`) or named sets of source mappings: {name: [source, ...]}.

    A path, a list of paths or of source mappings, or one source mapping is one set named `eval`.
    """
    if value is None:
        return None
    if (holdout := parse_holdout(value)) is not None:
        return holdout
    if not isinstance(value, Mapping):
        return {"eval": _some_sources(value)}
    named = cast("Mapping[Any, Any]", value)
    if not named:
        raise ValueError("names no set; null is no held-out data")
    if isinstance(named.get("path"), str) and set(named) <= set(SourceSection.model_fields):
        return {"eval": [named]}
    return {name: _some_sources(sources) for name, sources in named.items()}


def check_mixture(sources: list[SourceSection], *, mix_by: str, mix_stop: str) -> None:
    """Raises ValueError where some sources have a weight and others none, or nothing is mixed."""
    weights = [source.weight for source in sources]
    if any(weights) and not all(weights):
        bare = next(source.path for source in sources if source.weight is None)
        raise ValueError(f"{bare} has no weight, others have; give one to all sources or to none")
    if not any(weights) and mix_by != "rows":
        raise ValueError(f"mix_by: {mix_by} is about weights, and no source has one")
    if not any(weights) and mix_stop != "all_exhausted":
        raise ValueError(f"mix_stop: {mix_stop} is about weights, and no source has one")
    if not any(weights) and all(source.epochs is None for source in sources):
        return
    seen: set[tuple[str, str | None, str | None]] = set()
    for source in sources:
        key = (source.path, source.subset, source.split)
        if key in seen:
            raise ValueError(f"{source.path} is in the mixture twice; give it once, with epochs")
        seen.add(key)


def check_held_out(sets: dict[str, list[SourceSection]]) -> None:
    """Raises ValueError where a held-out source has what only a mixture has."""
    for source in (source for sources in sets.values() for source in sources):
        if source.weight is not None or source.epochs is not None:
            raise ValueError(f"{source.path}: held-out data has neither weight nor epochs")


def _some_sources(value: Any) -> Any:
    sources = parse_sources(value)
    if not sources:
        raise ValueError("a set of held-out data names no file")
    return sources


def _plain_eval(value: Holdout | dict[str, list[SourceSection]]) -> Any:
    if isinstance(value, Holdout):
        return value.plain()
    return {name: [source.model_dump(mode="json") for source in value[name]] for name in value}


Sources = Annotated[
    list[SourceSection],
    BeforeValidator(parse_sources),
]
"""A path, a source mapping, or a list of either."""

EvalSource = Annotated[
    InstanceOf[Holdout] | dict[str, list[SourceSection]],
    BeforeValidator(parse_eval),
    PlainSerializer(_plain_eval),
    WithJsonSchema({}),  # written by describe.py, which may refer to SourceSection
]
"""A share of the training rows, a number of them, files, or named sets of files."""
