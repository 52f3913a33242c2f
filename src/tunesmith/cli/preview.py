"""`tunesmith preview`: what will be learned from the data, token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.inputs import (
    Arguments,
    DataOption,
    ModelOption,
    recipe_from_arguments,
    split_arguments,
)
from tunesmith.errors import DataError, ModelError

if TYPE_CHECKING:
    from tunesmith.config.schema import Recipe
    from tunesmith.data.faults import Fault
    from tunesmith.data.prepare import PreparedRow
    from tunesmith.data.render import Rendered
    from tunesmith.data.template import Template


def preview(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a row on stdout, nothing else.")
    ] = False,
) -> None:
    """Show what will be learned from the data; loads the tokenizer, never weights."""
    from tunesmith.data.faults import Fault

    recipe = recipe_from_arguments(arguments, model, data)
    template = open_template(recipe)
    source, _ = split_arguments(arguments or ())
    shown = islice(_rows(recipe, template, source), rows)
    for row in shown:
        result = row.result
        if isinstance(result, Fault):
            if _refused(result, recipe):
                raise DataError(result.message, where=str(row.origin), hint=_hint(result))
            result = _dropped(result)
        assert result is not None
        if as_json:
            print(json.dumps(record(row, result), ensure_ascii=False))
        else:
            _show(row, result, template)


def open_template(recipe: Recipe) -> Template:
    """The tokenizer and chat template that the recipe trains with."""
    from tunesmith.data.template import load_template

    return load_template(
        _tokenizer_folder(recipe),
        template=recipe.data.template,
        kwargs=recipe.data.template_kwargs,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def _tokenizer_folder(recipe: Recipe) -> Path:
    """The folder as it stands if it holds a tokenizer: weights need not be there for a preview."""
    from tunesmith.model.source import resolve_model

    folder = Path(recipe.model.name).expanduser()
    names = ("tokenizer.json", "tokenizer_config.json")
    if recipe.model.revision is None and any((folder / name).is_file() for name in names):
        return folder
    return resolve_model(recipe.model.name, revision=recipe.model.revision).tokenizer_folder


def _rows(recipe: Recipe, template: Template, recipe_file: str | None) -> Iterator[PreparedRow]:
    from tunesmith.data.prepare import iter_prepared
    from tunesmith.train.sources import make_sources

    section = recipe.data
    folders: list[Path] = []
    if recipe_file is not None:
        given = Path(recipe_file).expanduser()
        folders = [given if given.is_dir() else given.parent]
    max_length = template.context_length if section.max_length == "auto" else section.max_length
    if max_length is None:
        raise ModelError(
            "the model names no context length",
            where="data.max_length",
            hint="give data.max_length=N",
        )
    return iter_prepared(
        make_sources(section.train, section, folders=folders),
        template,
        train_on=section.train_on,
        max_length=max_length,
        too_long=section.too_long,
    )


def record(row: PreparedRow, result: Rendered) -> dict[str, Any]:
    """The row as one object: its outcome, its segments, its targets."""
    segments = result.document.segments if result.document is not None else ()
    return {
        "source": row.origin.source,
        "row": row.origin.row,
        "status": result.status,
        "reason": result.reason,
        "segments": [
            {"parent": segment.parent, "start": segment.start, "ids": segment.ids.tolist()}
            for segment in segments
        ],
        "targets": [
            {
                "segment": number,
                "index": index,
                "id": int(segment.ids[index]),
                "weight": weight,
                "message": message if message >= 0 else None,
            }
            for number, segment in enumerate(segments)
            for index, weight, message in zip(
                segment.index.tolist(),
                segment.weight.tolist(),
                segment.message.tolist(),
                strict=True,
            )
        ],
    }


def _refused(fault: Fault, recipe: Recipe) -> bool:
    from tunesmith.data.render import TOO_LONG

    return fault.kind == TOO_LONG or recipe.data.bad_rows == "error"


def _hint(fault: Fault) -> str:
    from tunesmith.data.render import TOO_LONG

    if fault.kind == TOO_LONG:
        return fault.hint or ""
    drop = "data.bad_rows=drop goes on without such rows"
    return f"{fault.hint}; {drop}" if fault.hint else drop


def _dropped(fault: Fault) -> Rendered:
    from tunesmith.data.render import Rendered

    return Rendered(None, "dropped", f"{fault.kind}: {fault.message}", 0)


def _show(row: PreparedRow, result: Rendered, template: Template) -> None:
    from rich.console import Console

    from tunesmith.cli.tokens_view import row_view

    Console(highlight=False, soft_wrap=True).print(row_view(row.origin, result, template))
