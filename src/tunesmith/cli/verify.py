"""`tunesmith verify`: check the promises P1 to P6 on the user's own model, data and machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.inputs import (
    Arguments,
    DataOption,
    ModelOption,
    recipe_from_arguments,
    split_arguments,
)
from tunesmith.display import put

if TYPE_CHECKING:
    from tunesmith.verify.verify import Verification


def verify(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    documents: Annotated[
        int, typer.Option("--documents", min=1, help="Number of documents in a step.")
    ] = 6,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Number of rows to use, the first of each file.")
    ] = 64,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Also train with this number of processes.")
    ] = 1,
    out: Annotated[
        str | None,
        typer.Option(help="Folder for verify.md and verify.json. By default the run's folder."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False,
) -> int:
    """Check promises P1 to P6 on the recipe's model and data, in minutes.

    Returns 0, or 1 if a promise does not hold.
    """
    from tunesmith.storage.run_folder import is_run
    from tunesmith.verify.table import keep
    from tunesmith.verify.verify import verify as examine
    from tunesmith.verify.workload import Bounds

    recipe = recipe_from_arguments(arguments, model, data)
    source, changes = split_arguments(arguments or ())
    path = Path(source).expanduser() if source is not None else None
    folders = [path if path.is_dir() else path.parent] if path is not None else []
    # With another model, other data or other settings, the run's own files say nothing about what
    # is verified, so they are left out.
    unchanged = model is None and not data and not changes
    run = path if path is not None and unchanged and is_run(path) else None
    found = examine(
        recipe,
        bounds=Bounds(documents=documents, rows=rows),
        run=run,
        folders=folders,
        ranks=ranks,
        say=lambda text: put(text, file=sys.stderr, flush=True),
    )
    if as_json:
        put(json.dumps(found.record(), ensure_ascii=False, indent=1))
    else:
        put("\n".join(lines(found)))
    place = Path(out) if out is not None else run
    if place is not None:
        page, _ = keep(found, place)
        put(f"written: {page}", file=sys.stderr)
    return 0 if found.holds else 1


def lines(found: Verification) -> list[str]:
    """The table for a terminal: a line for each check, and below it what was compared."""
    from tunesmith.verify.table import counts, difference, number, verdict

    page: list[str] = []
    for outcome in found.outcomes:
        allowed = "" if outcome.tolerance is None else f" (allowed {number(outcome.tolerance)})"
        seen = "" if outcome.difference is None else f"{difference(outcome)}{allowed}"
        page.append(
            f"{outcome.promise}  {outcome.name:<24}  {outcome.verdict:<11}  {seen}".rstrip()
        )
        page.append(f"    {outcome.compared}")
        page.append(f"    compared with {outcome.oracle}")
        page += [f"    {text}" for text in (counts(outcome.counts), outcome.note) if text]
        if outcome.advice:
            page.append(f"    hint: {outcome.advice}")
    settings = ", ".join(f"{key} {value}" for key, value in found.about["settings"].items())
    return [*page, settings, verdict(found)]
