"""`tunesmith doctor`: what is wrong with the data before a run, on one page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.inputs import (
    Arguments,
    DataOption,
    EvalOption,
    ModelOption,
    folders_of,
    recipe_from_arguments,
)

if TYPE_CHECKING:
    from tunesmith.doctor.examine import Diagnosis


def doctor(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval: EvalOption = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Look at the first rows of each file only.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with 1 at a warning too, not at an error only.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> int:
    """Examine the data without training; loads the tokenizer, never weights.

    Returns 0, or 1 if a check is at level error (with `strict`, at level warning).
    """
    from tunesmith.cli.preview import open_template
    from tunesmith.doctor.catalogue import worst
    from tunesmith.doctor.examine import diagnose

    recipe = recipe_from_arguments(arguments, model, data, eval)
    found = diagnose(
        recipe, open_template(recipe, dated=True), folders=folders_of(arguments), rows=rows
    )
    if as_json:
        print(json.dumps(record(found), ensure_ascii=False, indent=1))
    else:
        from tunesmith.cli.doctor_view import show

        show(found)
    return 1 if worst(found.findings) in (("error", "warning") if strict else ("error",)) else 0


def record(found: Diagnosis) -> dict[str, object]:
    """The whole page as one object: `level`, `summary`, `checks`."""
    from tunesmith.doctor.catalogue import worst

    return {
        "level": worst(found.findings),
        "summary": found.summary,
        "checks": [finding.record() for finding in found.findings],
    }
