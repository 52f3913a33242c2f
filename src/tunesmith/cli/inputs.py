"""Arguments of commands that read a recipe: `RECIPE` or `--model --data`, then `section.key=value`
overrides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.config.overrides import Override
from tunesmith.config.read import read_recipe
from tunesmith.config.schema import Recipe
from tunesmith.errors import RecipeError

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [SECTION.KEY=VALUE]...",
        help="A recipe file or a run folder, then what to change in it, as in optim.lr=1e-4.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Hub id, model folder, .gguf file or run folder (model.name)."),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="File to learn from; may be given again (data.train)."),
]
EvalOption = Annotated[
    str | None,
    typer.Option("--eval", help="Held-out file, or a share of the rows: 2% (data.eval)."),
]


def recipe_from_arguments(
    arguments: Sequence[str] | None,
    model: str | None = None,
    data: Sequence[str] | None = None,
    eval: str | None = None,
) -> Recipe:
    """The recipe that positional arguments and the three options ask for.

    Raises:
        RecipeError: two recipes, no model or no data, or anything `read_recipe` refuses.
    """
    source, changes = split_arguments(arguments or ())
    overrides: list[str | Override] = []
    if model is not None:
        overrides.append(Override(("model", "name"), model, "--model"))
    if data:
        overrides.append(Override(("data", "train"), list(data), "--data"))
    if eval is not None:
        overrides.append(_eval_override(eval))
    recipe = read_recipe(source, [*overrides, *changes])
    if not recipe.data.train:
        raise RecipeError(
            "no data to learn from",
            where=" ".join(part for part in (source, "data.train") if part),
            hint="give --data FILE, or data.train in the recipe",
        )
    return recipe


def folders_of(arguments: Sequence[str] | None) -> list[Path]:
    """The folder of the recipe that is asked for, where its data may lie as well."""
    source, _ = split_arguments(arguments or ())
    if source is None:
        return []
    given = Path(source).expanduser()
    return [given if given.is_dir() else given.parent]


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe among positional arguments, if there is one, and the overrides.

    Raises:
        RecipeError: an argument that is neither.
    """
    source: str | None = None
    overrides: list[str] = []
    for argument in arguments:
        if "=" in argument and not _is_recipe(argument):
            overrides.append(argument)
        elif source is None:
            source = argument
        else:
            raise RecipeError(
                f"{argument!r} is a second recipe, after {source!r}",
                hint="changes have the form section.key=value, data the form --data FILE",
            )
    return source, overrides


def _is_recipe(argument: str) -> bool:
    return argument.endswith((".yaml", ".yml")) and Path(argument).is_file()


def _eval_override(text: str) -> Override | str:
    """A share, a number and a path mean the same as text; lists and mappings are YAML."""
    if text.lstrip().startswith(("{", "[")):
        return f"data.eval={text}"
    return Override(("data", "eval"), text, "--eval")
