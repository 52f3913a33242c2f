"""`tunesmith convert`: conversion of rows to the messages or the prompt_completion format."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.score import check_output
from tunesmith.display import put
from tunesmith.errors import InputError, RecipeError, RunError, first_line

if TYPE_CHECKING:
    from tunesmith.data.row_errors import Fault
    from tunesmith.data.sources.sources import Row, Source
    from tunesmith.types import Origin

_LINES, _PARQUET = (".jsonl", ".ndjson"), ".parquet"


def convert(
    data: Annotated[
        str, typer.Argument(metavar="IN", help="File, folder, glob pattern or hub data set.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .jsonl or .parquet.")],
    to: Annotated[
        str, typer.Option("--to", help="Format to write: messages or prompt_completion.")
    ] = "messages",
    format: Annotated[
        str, typer.Option("--format", help="Format of the rows. auto detects it by their columns.")
    ] = "auto",
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Column names, ours then the data's: '{prompt: question}'."),
    ] = None,
    bad_rows: Annotated[
        str, typer.Option("--bad-rows", help="error stops at a bad row, drop leaves it out.")
    ] = "error",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
) -> None:
    """Write the rows of IN in another format; training on either file has the same targets."""
    from tunesmith.data.formats.convert import TARGETS
    from tunesmith.data.preprocess.errors import refusal

    _one_of("--to", to, TARGETS)
    _one_of("--bad-rows", bad_rows, ("error", "drop"))
    if out.suffix.lower() not in (*_LINES, _PARQUET):
        raise InputError(
            "the name must end in .jsonl or .parquet", where=str(out), hint="give OUT.jsonl"
        )
    check_output(out, overwrite=overwrite)
    sources = _sources(data, format, columns)
    if any(s.path is not None and out.exists() and out.samefile(s.path) for s in sources):
        raise InputError("is an input file", where=str(out), hint="give another file as OUT")
    faults: list[tuple[Origin, Fault]] = []
    counts = {"rows": 0, "written": 0}
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        _write(temporary, out.suffix.lower(), _converted(sources, to, faults, counts))
        if faults and bad_rows == "error":
            raise _as_option(refusal(faults, counts["rows"], None))
        if not counts["written"]:
            raise InputError(f"none of the {counts['rows']} rows can be converted", where=data)
        os.replace(temporary, out)
    except OSError as error:
        raise RunError(f"can't be written: {error.strerror or error}", where=str(out)) from error
    finally:
        temporary.unlink(missing_ok=True)
    dropped = f"; left out {len(faults):,} bad rows" if faults else ""
    put(f"wrote {counts['written']:,} rows to {out} as {to}{dropped}")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(
            f"{value!r} is not allowed", where=option, hint=f"give {' or '.join(allowed)}"
        )


def _as_option(error: InputError) -> InputError:
    return type(error)(error.message, where=error.where, hint="--bad-rows drop leaves them out")


def _sources(data: str, format: str, columns: str | None) -> list[Source]:
    from tunesmith.build.sources import make_sources
    from tunesmith.config.read import read_recipe

    section: dict[str, Any] = {"path": data, "format": format}
    if columns is not None:
        section["columns"] = columns
    recipe = read_recipe({"model": {"name": "none"}, "data": {"train": [section]}}, [])
    return make_sources(recipe.data.train, recipe.data)


def _converted(
    sources: list[Source], to: str, faults: list[tuple[Origin, Fault]], counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """The converted rows. Errors of rows that can't be converted are appended to `faults`."""
    from tunesmith.data.row_errors import RowError
    from tunesmith.data.sources.sources import read_rows

    for source in sources:
        chosen = None if source.format == "auto" else source.format
        for row in read_rows(source):
            counts["rows"] += 1
            try:
                chosen, converted = _one(row, chosen, to)
            except RowError as error:
                faults.append((row.origin, error.fault))
            else:
                counts["written"] += 1
                yield converted


def _one(row: Row, chosen: str | None, to: str) -> tuple[str, dict[str, Any]]:
    from tunesmith.data.formats.convert import convert_row
    from tunesmith.data.formats.detect import detect_format
    from tunesmith.data.row_errors import Fault, RowError, listing

    if row.values is None:
        raise RowError(row.fault or Fault("invalid-row", "the row can't be read"))
    chosen = chosen or detect_format(row.values)
    if chosen is None:
        raise RowError(
            Fault("unknown-format", f"no format has these columns: {listing(row.values)}")
        )
    return chosen, convert_row(row.values, format=chosen, to=to)


def _write(path: Path, suffix: str, rows: Iterator[dict[str, Any]]) -> None:
    if suffix != _PARQUET:
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        return
    import pyarrow
    from pyarrow import parquet

    found = list(rows)
    try:
        table: Any = pyarrow.Table.from_pylist(found)
    except pyarrow.ArrowException as error:
        raise InputError(
            f"the rows don't fit one Parquet schema: {first_line(error)}",
            hint="write JSON Lines: OUT.jsonl",
        ) from error
    parquet.write_table(table, path)
