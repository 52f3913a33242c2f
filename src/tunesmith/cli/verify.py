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

if TYPE_CHECKING:
    from tunesmith.verify.verify import Verification


def verify(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    documents: Annotated[
        int, typer.Option("--documents", min=1, help="Documents that are learned from at once.")
    ] = 6,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="First rows of each file that are looked at.")
    ] = 64,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Also train on so many processes.")
    ] = 1,
    out: Annotated[
        str | None,
        typer.Option(help="Folder for verify.md and verify.json; a run's own by default."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> int:
    """Prove P1 to P6 on the recipe's model and data, in minutes.

    Returns 0, or 1 if a promise does not hold.
    """
    from tunesmith.storage.run_folder import is_run
    from tunesmith.verify.table import keep
    from tunesmith.verify.verify import verify as examine
    from tunesmith.verify.workload import Bounds

    recipe = recipe_from_arguments(arguments, model, data)
    source, changes = split_arguments(arguments or ())
    given = Path(source).expanduser() if source is not None else None
    folders = [given if given.is_dir() else given.parent] if given is not None else []
    # Another model, data or setting than the run's own: then it is not the run that is looked at.
    unchanged = model is None and not data and not changes
    run = given if given is not None and unchanged and is_run(given) else None
    found = examine(
        recipe,
        bounds=Bounds(documents=documents, rows=rows),
        run=run,
        folders=folders,
        ranks=ranks,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if as_json:
        print(json.dumps(found.record(), ensure_ascii=False, indent=1))
    else:
        print("\n".join(lines(found)))
    place = Path(out) if out is not None else run
    if place is not None:
        page, _ = keep(found, place)
        print(f"written: {page}", file=sys.stderr)
    return 0 if found.holds else 1


def lines(found: Verification) -> list[str]:
    """The table for a terminal of any width: a line a promise, and below it what was compared."""
    from tunesmith.verify.table import counts, difference, number, verdict

    page: list[str] = []
    for outcome in found.outcomes:
        allowed = "" if outcome.tolerance is None else f" (allowed {number(outcome.tolerance)})"
        seen = "" if outcome.difference is None else f"{difference(outcome)}{allowed}"
        page.append(
            f"{outcome.promise}  {outcome.name:<24}  {outcome.verdict:<11}  {seen}".rstrip()
        )
        page.append(f"    {outcome.compared}")
        page.append(f"    against {outcome.oracle}")
        page += [f"    {text}" for text in (counts(outcome.counts), outcome.note) if text]
        if outcome.advice:
            page.append(f"    hint: {outcome.advice}")
    settings = ", ".join(f"{key} {value}" for key, value in found.about["settings"].items())
    return [*page, settings, verdict(found)]
