"""The recipe's section `data` and its sources: a path, or a mapping with weight, columns, split.

A short form, such as a path alone, becomes a list of `SourceSection` before pydantic validates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BeforeValidator,
    Field,
    InstanceOf,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from tunesmith.config.sections.base import Count, Number, Section
from tunesmith.config.values import Holdout, parse_columns, parse_holdout

Columns = Annotated[dict[str, str], BeforeValidator(parse_columns)]
"""Our name of a column to its name in the data: {prompt: question}."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_listed)]
"""A name, or a list of them."""


class SourceSection(Section):
    """One data source: a file, folder, glob pattern or hub data set."""

    path: str = Field(
        min_length=1,
        description="file, folder, glob pattern (data/*.jsonl), or hub id (org/name) of a data set",
    )
    subset: str | None = Field(
        default=None,
        min_length=1,
        description="subset (config) of a hub data set or folder that has several",
    )
    split: str | None = Field(
        default=None,
        min_length=1,
        description="split of a hub data set or folder; train if there is one and none is given",
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
    ] = Field(default="auto", description="format of the rows; auto: found by the columns")
    columns: Columns | None = Field(
        default=None,
        description="column names as in data.columns, which they replace for this source",
    )
    roles: Columns | None = Field(
        default=None,
        description="roles as in data.roles, which they replace for this source",
    )
    ignore_fields: Names | None = Field(
        default=None,
        description="fields as in data.ignore_fields, which they replace for this source",
    )
    weight: Annotated[Number, Field(gt=0)] | None = Field(
        default=None,
        description="sampling weight in the mixture, relative to the weights of the other sources",
    )
    epochs: Annotated[Number, Field(gt=0)] | None = Field(
        default=None,
        description="times that an epoch of the run contains this source, 0.25 for a quarter of "
        "it; with weights: passes after which it counts as exhausted",
    )
    limit: Count | None = Field(default=None, ge=1, description="use only this many first rows")


def parse_sources(value: Any) -> Any:
    """Read `data.train`: a list of source mappings from a path, a mapping, or a list of either."""
    if value is None:
        return []
    items = cast("list[Any]", value) if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def parse_eval(value: Any) -> Any:
    """Read `data.eval`: None, a Holdout (`2%`, `200`) or named sets {name: [source mapping, ...]}.

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
        raise ValueError("names no set of files; write null for no evaluation data")
    if isinstance(named.get("path"), str) and set(named) <= set(SourceSection.model_fields):
        return {"eval": [named]}
    return {name: _some_sources(sources) for name, sources in named.items()}


def check_mixture(sources: list[SourceSection], *, mix_by: str, mix_stop: str) -> None:
    """Refuse weights for only some sources, options without weights, and a source given twice.

    Raises:
        ValueError: one of these.
    """
    weights = [source.weight for source in sources]
    if any(weights) and not all(weights):
        bare = next(source.path for source in sources if source.weight is None)
        raise ValueError(f"{bare} has no weight and others have one; give all of them one, or none")
    if not any(weights) and mix_by != "rows":
        raise ValueError(f"mix_by: {mix_by} has no effect, since no source has a weight")
    if not any(weights) and mix_stop != "all_exhausted":
        raise ValueError(f"mix_stop: {mix_stop} has no effect, since no source has a weight")
    if not any(weights) and all(source.epochs is None for source in sources):
        return
    seen: set[tuple[str, str | None, str | None]] = set()
    for source in sources:
        key = (source.path, source.subset, source.split)
        if key in seen:
            raise ValueError(f"{source.path} is in the mixture twice; give it once, with `epochs`")
        seen.add(key)


def check_held_out(sets: dict[str, list[SourceSection]]) -> None:
    """Raises ValueError where a source of evaluation data has a weight or epochs."""
    for source in (source for sources in sets.values() for source in sources):
        if source.weight is not None or source.epochs is not None:
            raise ValueError(f"{source.path}: evaluation data can have neither weight nor epochs")


def _some_sources(value: Any) -> Any:
    sources = parse_sources(value)
    if not sources:
        raise ValueError("a set of evaluation data names no file")
    return sources


def _plain_eval(value: Holdout | dict[str, list[SourceSection]]) -> Any:
    if isinstance(value, Holdout):
        return value.plain()
    return {name: [source.model_dump(mode="json") for source in value[name]] for name in value}


Sources = Annotated[list[SourceSection], BeforeValidator(parse_sources)]
"""A path, a source mapping, or a list of either."""

EvalSource = Annotated[
    InstanceOf[Holdout] | dict[str, list[SourceSection]],
    BeforeValidator(parse_eval),
    PlainSerializer(_plain_eval),
    WithJsonSchema({}),  # written by describe.py, which may refer to SourceSection
]
"""A fraction of the training rows, a number of them, files, or named sets of files."""


class DataSection(Section):
    """The training and evaluation data, and how rows become tokens."""

    train: Sources = Field(
        default_factory=list[SourceSection],
        description="training data: a path, a mapping as described below, or a list of these",
    )
    mix_by: Literal["rows", "tokens"] = Field(
        default="rows", description="unit of the sources' weights: documents or tokens"
    )
    mix_stop: Literal["all_exhausted", "first_exhausted"] = Field(
        default="all_exhausted",
        description="with weights, an epoch ends when all sources have been seen, or before any "
        "source is repeated",
    )
    eval: EvalSource | None = Field(
        default=None,
        description="evaluation data: files, {name: files}, or a fraction (2%) or number of the "
        "training rows, which is held out",
    )
    columns: Columns | None = Field(
        default=None, description="names of columns, ours to the data's, e.g. {prompt: question}"
    )
    roles: Columns | None = Field(
        default=None,
        description="names of roles in the data, each to the role that it is read as, e.g. "
        "{expert: assistant}; {critic: critic} keeps one as it is",
    )
    ignore_fields: Names | None = Field(
        default=None,
        description="columns, fields of messages and of content parts that are not read, e.g. "
        "[context, loss]; they are counted in the ledger",
    )
    template: str | None = Field(
        default=None,
        description="chat template: a .jinja file, another model's folder or hub id, chatml "
        "(built in), or none (no template: raw text); null: the model's own",
    )
    template_kwargs: dict[str, str | bool | int | float] = Field(
        default_factory=dict,
        description="variables that are passed to the chat template, e.g. {enable_thinking: false}",
    )
    train_on: Literal["auto", "assistant", "last", "completion", "all"] | list[str] = Field(
        default="auto",
        description="loss mask, the tokens that are targets: assistant messages, the last of them, "
        "completions, all tokens, or the messages of a list of roles; auto: completions of "
        "prompt-completion rows, else assistant messages",
    )
    max_length: Literal["auto"] | Annotated[Count, Field(ge=2)] = Field(
        default="auto",
        description="largest number of tokens from a document's first token to the end of an "
        "answer; auto: the model's context window",
    )
    too_long: Literal["error", "drop", "truncate", "split"] = Field(
        default="error",
        description="what happens to rows over max_length: an error, the row is dropped, "
        "truncated, or split into pieces",
    )
    bad_rows: Literal["error", "drop"] = Field(
        default="error",
        description="what happens to rows that can't be trained on: an error that names them, or "
        "they are dropped and entered in the ledger",
    )
    shuffle: bool = Field(
        default=True,
        description="shuffle the documents anew in each epoch, by train.seed; false: keep the "
        "order of the data",
    )

    @model_validator(mode="after")
    def _mixture(self) -> DataSection:
        check_mixture(self.train, mix_by=self.mix_by, mix_stop=self.mix_stop)
        if isinstance(self.eval, dict):
            check_held_out(self.eval)
        return self
