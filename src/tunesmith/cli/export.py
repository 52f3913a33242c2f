"""`tunesmith export`: write a trained model as Hugging Face folder, GGUF or for Ollama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.session import tell
from tunesmith.errors import RecipeError


def export(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, model folder, hub id or adapter.")
    ],
    to: Annotated[str, typer.Option("--to", help="hf, adapter, gguf or ollama.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="New folder; by default RUN-FORM beside RUN.")
    ] = None,
    quantize: Annotated[
        str, typer.Option("--quantize", help="Of gguf and ollama: f16, bf16 or q8_0.")
    ] = "f16",
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Send it to the hub, private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: for all to see.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code of the model's folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    from tunesmith.export.hub import check_name
    from tunesmith.export.hub import push as send
    from tunesmith.export.run import export as write

    if push is not None:
        check_name(push)
    folder = out or Path(f"{model.rstrip('/')}-{to}")
    result = write(model, to, folder, quantize=quantize, trust=trust_remote_code, tell=tell)
    if push is not None:
        result["pushed"] = send(folder, push, public=public)
        tell(f"pushed to {result['pushed']}")
    print(json.dumps(result) if as_json else folder)


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

    parts = [
        find_part(name, weight=weight, base=model)
        for name, weight in map(adapter_and_weight, adapters)
    ]
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


def adapter_and_weight(text: str) -> tuple[str, float]:
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
