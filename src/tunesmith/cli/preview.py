"""`tunesmith preview`: rows as tokens, with the targets (the tokens that are learned) marked."""

from __future__ import annotations

import json
import sys
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
from tunesmith.cli.session import print_status
from tunesmith.display import put
from tunesmith.errors import DataError, InputError, ModelError

if TYPE_CHECKING:
    from tunesmith.config.schema import Recipe
    from tunesmith.data.preprocess.prepare import PreparedRow
    from tunesmith.data.rendering.render import Rendered
    from tunesmith.data.row_errors import Fault
    from tunesmith.data.templates.template import Template

SHOWN, SHOWN_ON_PAGE = 3, 1000


def preview(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Number of rows. [default: 3; with --html 1000]"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each row, nothing else.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write an HTML page of the rows to this file."),
    ] = None,
) -> None:
    """Show the tokens of rows and which of them are targets; loads the tokenizer, no weights."""
    from tunesmith.data.preprocess.errors import field_lines
    from tunesmith.data.preprocess.ledger import Ledger
    from tunesmith.data.row_errors import Fault

    recipe = recipe_from_arguments(arguments, model, data)
    template = open_template(recipe)
    source, _ = split_arguments(arguments or ())
    prepared = _rows(recipe, template, source)
    if html is not None:
        if as_json:
            raise InputError("--html and --json exclude each other", hint="give one of the two")
        _write_page(html, prepared, rows or SHOWN_ON_PAGE, recipe=recipe, template=template)
        return
    ledger = Ledger()
    for row in islice(prepared, rows or SHOWN):
        result = row.result
        for field in row.all_fields:
            ledger.note_field(row.origin, field)
        if isinstance(result, Fault):
            if _refused(result, recipe):
                raise _refusal(row, result)
            result = _dropped(result)
        assert result is not None
        if as_json:
            put(json.dumps(record(row, result), ensure_ascii=False))
        else:
            _show(row, result, template)
    for line in field_lines(ledger):
        print_status(line)


def open_template(recipe: Recipe, *, dated: bool = False) -> Template:
    """The tokenizer and chat template that the recipe trains with.

    If the model is a run, they are those of the run, with the template arguments of its training.
    """
    from tunesmith.data.templates.load import load_template
    from tunesmith.export import read_choice

    tokenizer, folder = _folders(recipe)
    choice = read_choice(folder)
    name, kwargs = recipe.data.template, dict(recipe.data.template_kwargs)
    if choice is not None:
        name = "none" if name is None and choice.raw else name
        kwargs = {**choice.template_kwargs, **kwargs}
    return load_template(
        tokenizer,
        template=name,
        kwargs=kwargs,
        trust_remote_code=recipe.model.trust_remote_code,
        dated=dated,
    )


def _folders(recipe: Recipe) -> tuple[Path, Path]:
    """The tokenizer's folder, and the folder that may hold a run's template choice.

    A folder with a tokenizer is enough, since a preview needs no weights.
    """
    from tunesmith.model.model_files import check_model_files
    from tunesmith.model.source import resolve_model

    folder = Path(recipe.model.name).expanduser()
    names = ("tokenizer.json", "tokenizer_config.json")
    if recipe.model.revision is None and any((folder / name).is_file() for name in names):
        check_model_files(folder, weights=False)
        return folder, folder
    source = resolve_model(recipe.model.name, revision=recipe.model.revision, weights=False)
    return source.tokenizer_folder, source.adapter_folder or source.folder


def _rows(recipe: Recipe, template: Template, recipe_file: str | None) -> Iterator[PreparedRow]:
    from tunesmith.build.sources import make_sources
    from tunesmith.data.preprocess.prepare import iter_prepared

    section = recipe.data
    folders: list[Path] = []
    if recipe_file is not None:
        path = Path(recipe_file).expanduser()
        folders = [path if path.is_dir() else path.parent]
    max_length = template.context_length if section.max_length == "auto" else section.max_length
    if max_length is None:
        raise ModelError(
            "the model's config has no context length",
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


def _write_page(
    path: Path, prepared: Iterator[PreparedRow], rows: int, *, recipe: Recipe, template: Template
) -> None:
    """Write the page, which also shows rows that a run would refuse, then raise their error."""
    from tunesmith.data.preprocess.ledger import Ledger
    from tunesmith.data.preprocess.prepare import record_outcome
    from tunesmith.data.row_errors import Fault
    from tunesmith.pages.preview import ShownRow, preview_page, turns_of
    from tunesmith.storage.atomic import write_text

    if not path.parent.is_dir():
        raise InputError("there is no such folder", where=str(path.parent))
    ledger, shown = Ledger(), list[ShownRow]()
    refusal: DataError | None = None
    refused = 0
    for row in islice(prepared, rows):
        record_outcome(ledger, row.origin, row.result)
        result = row.result
        stops = isinstance(result, Fault) and _refused(result, recipe)
        if isinstance(result, Fault):
            refusal = refusal or (_refusal(row, result) if stops else None)
            refused += stops
            result = _dropped(result)
        assert result is not None
        turns = turns_of(row.values, templated=template.has_chat_template)
        shown.append(ShownRow(row.origin, row.values, result, stops, turns))
    more = next(prepared, None) is not None
    text = preview_page(
        shown, template, ledger=ledger, settings=_settings(recipe, template), more=more
    )
    write_text(path, text)
    first = "the first " if more else ""
    put(f"wrote {first}{len(shown):,} rows to {path}", file=sys.stderr)
    if refusal is not None:
        refusal.message += f" ({refused:,} such rows on the page)" if refused > 1 else ""
        raise refusal


def _settings(recipe: Recipe, template: Template) -> dict[str, str]:
    section = recipe.data
    return {
        "model": recipe.model.name,
        "data": ", ".join(source.path for source in section.train),
        "template": " ".join([template.name, *(f"{k}={v}" for k, v in template.kwargs.items())]),
        "train_on": str(section.train_on),
        "max_length": str(section.max_length),
        "too_long": section.too_long,
        "bad_rows": section.bad_rows,
    }


def record(row: PreparedRow, result: Rendered) -> dict[str, Any]:
    """The row as a JSON object: its status, its segments and its targets."""
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
    from tunesmith.data.rendering.result import TOO_LONG

    return fault.kind == TOO_LONG or fault.stops or recipe.data.bad_rows == "error"


def _refusal(row: PreparedRow, fault: Fault) -> DataError:
    return DataError(fault.message, where=str(row.origin), hint=_hint(fault))


def _hint(fault: Fault) -> str:
    from tunesmith.data.rendering.result import TOO_LONG

    if fault.kind == TOO_LONG or fault.stops:
        return fault.hint or ""
    drop = "data.bad_rows=drop leaves such rows out"
    return f"{fault.hint}; {drop}" if fault.hint else drop


def _dropped(fault: Fault) -> Rendered:
    from tunesmith.data.rendering.render import Rendered

    return Rendered(None, "dropped", f"{fault.kind}: {fault.message}", 0)


def _show(row: PreparedRow, result: Rendered, template: Template) -> None:
    from rich.console import Console

    from tunesmith.cli.tokens_view import row_view

    Console(highlight=False, soft_wrap=True).print(row_view(row.origin, result, template))
