"""`tunesmith init` and `tunesmith schema`: a starter recipe, and the recipe's JSON Schema."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.display import put
from tunesmith.errors import RecipeError


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="Value of model.name.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Value of data.train. Repeat it for several files."),
    ] = None,
) -> None:
    from tunesmith.config.describe import starter_recipe

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter_recipe(model=model, data=data or None))
    except FileExistsError:
        raise RecipeError(
            "the file exists already",
            where=str(path),
            hint="give another file: tunesmith init FILE",
        ) from None
    except OSError as error:
        raise RecipeError(f"can't be written: {error.strerror}", where=str(path)) from None
    put(f"wrote {path}; next: tunesmith train {path}", file=sys.stderr)


def schema() -> None:
    from tunesmith.config.describe import recipe_schema

    put(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
