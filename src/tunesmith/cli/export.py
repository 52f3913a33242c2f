"""`tunesmith export`: write a trained model as Hugging Face folder, GGUF or for Ollama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.session import tell


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
