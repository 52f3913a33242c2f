"""`tunesmith export` and `tunesmith merge`: a trained model as a Hugging Face folder, an adapter,
GGUF or an Ollama model, and adapters merged into their base model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.session import print_status
from tunesmith.display import put
from tunesmith.errors import RecipeError


def export(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="Run folder, model folder, hub id or adapter.")
    ],
    to: Annotated[str, typer.Option("--to", help="Format: hf, adapter, gguf or ollama.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="New folder. By default RUN-FORMAT beside RUN.")
    ] = None,
    quantize: Annotated[
        str, typer.Option("--quantize", help="Weights of gguf and ollama: f16, bf16 or q8_0.")
    ] = "f16",
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="ORG/NAME", help="Also upload to this private hub repo."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: make the hub repo public.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code in the model folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    from tunesmith.export.hub import check_base, check_name
    from tunesmith.export.hub import push as send
    from tunesmith.export.run import export as write
    from tunesmith.model.source import resolve_model

    if push is not None:
        check_name(push)
        if to == "adapter":
            check_base(resolve_model(model).adapter_folder)
    folder = out or Path(f"{model.rstrip('/')}-{to}")
    result = write(
        model, to, folder, quantize=quantize, trust=trust_remote_code, on_status=print_status
    )
    if push is not None:
        result["pushed"] = send(folder, push, public=public)
        print_status(f"uploaded to {result['pushed']}")
    put(json.dumps(result) if as_json else folder)


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]...", help="Run or adapter folder, and its weight in the sum."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the merged model.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Base model. By default the one the adapters name."),
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
        print_status(
            f"merging {part.adapter} with weight {part.weight:g} into {part.source.folder}"
        )
        if quantization(part) != "none":
            print_status(
                f"note: this adapter was trained on a base quantized to {quantization(part)}; "
                "merged into the unquantized base, its logits differ from those in training by "
                "the quantization error"
            )
    report = merge_adapters(parts, out, trust_remote_code=trust_remote_code, overwrite=overwrite)
    print_status(
        "relative distance of the logits on the probe texts: "
        f"{report.merging:.1e} by merging in float32, "
        f"{report.rounding:.1e} by rounding to {report.dtype}, "
        f"{report.reloading:.1e} after reading the folder again"
    )
    put(to_json(report, parts, out) if as_json else out)


def adapter_and_weight(text: str) -> tuple[str, float]:
    """Name and weight of `NAME` or `NAME=WEIGHT`.

    Raises:
        RecipeError: the weight is 0, or not a finite number.
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
            f"{value!r} is not a weight",
            where=text,
            hint="give a number other than 0, as in runs/a=0.7",
        )
    return name, weight
