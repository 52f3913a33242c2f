"""`tunesmith merge`: one model out of a base and its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.session import tell
from tunesmith.errors import RecipeError


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]...", help="Run or adapter folder, and how much of it goes in."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the merged model.")],
    model: Annotated[
        str | None, typer.Option("--model", help="Base model; by default the adapters' own.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code of the model's folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    from tunesmith.export.merge import find_part, merge_adapters, quantization, to_json

    parts = [find_part(name, weight=weight, base=model) for name, weight in map(split, adapters)]
    for part in parts:
        tell(f"{part.adapter} x {part.weight:g} into {part.source.folder}")
        if quantization(part) != "none":
            tell(
                f"it was trained on a base kept as {quantization(part)}: on the plain one its "
                "logits differ from training's by what quantising took away"
            )
    report = merge_adapters(parts, out, trust_remote_code=trust_remote_code, overwrite=overwrite)
    tell(
        f"logits of the probe texts (relative distance): {report.merging:.1e} by merging in "
        f"float32, {report.rounding:.1e} by rounding to {report.dtype}, "
        f"{report.reloading:.1e} read back"
    )
    print(to_json(report, parts, out) if as_json else out)


def split(text: str) -> tuple[str, float]:
    """Name and weight of `NAME` or `NAME=WEIGHT`.

    Raises:
        RecipeError: the weight is no number, or 0.
    """
    if Path(text).expanduser().exists() or "=" not in text:
        return text, 1.0
    name, _, value = text.rpartition("=")
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not weight or abs(weight) == float("inf") or weight != weight:
        raise RecipeError(
            f"{value!r} is no weight", where=text, hint="a number other than 0, as in runs/a=0.7"
        )
    return name, weight
