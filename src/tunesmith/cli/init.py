"""`tunesmith init`: write a starter recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.errors import RecipeError


def init(
    path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option("--model", help="Fill in model.name.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Fill in data.train; may be given again.")
    ] = None,
) -> None:
    from tunesmith.config.describe import starter_recipe

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter_recipe(model=model, data=data or None))
    except FileExistsError:
        raise RecipeError(
            "exists already", where=str(path), hint="name another file: tunesmith init FILE"
        ) from None
    except OSError as error:
        raise RecipeError(f"can't be written: {error.strerror}", where=str(path)) from None
    print(f"wrote {path}; then: tunesmith train {path}", file=sys.stderr)


def schema() -> None:
    from tunesmith.config.describe import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
