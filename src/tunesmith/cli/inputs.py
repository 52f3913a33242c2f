"""Arguments of commands that read a recipe.

They take a recipe file, or `--model` and `--data`, and then overrides of the form
`section.key=value`.
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
        help="A recipe file or a run folder, then overrides of its keys, as in optim.lr=1e-4.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Sets model.name: hub id, model folder, .gguf or run folder."),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", help="Sets data.train: a training file. Repeat it for several files."),
]
EvalOption = Annotated[
    str | None,
    typer.Option("--eval", help="Sets data.eval: a held-out file, or a share of the rows (2%)."),
]


def recipe_from_arguments(
    arguments: Sequence[str] | None,
    model: str | None = None,
    data: Sequence[str] | None = None,
    eval: str | None = None,
) -> Recipe:
    """The recipe of the positional arguments and of the options --model, --data and --eval.

    Raises:
        RecipeError: there are two recipes, no model or no data, or `read_recipe` refuses a value.
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
            hint="give --data FILE, or set data.train in the recipe",
        )
    return recipe


def folders_of(arguments: Sequence[str] | None) -> list[Path]:
    """The folder of the recipe among the arguments, in which data is looked for too."""
    source, _ = split_arguments(arguments or ())
    if source is None:
        return []
    path = Path(source).expanduser()
    return [path if path.is_dir() else path.parent]


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe among positional arguments, or None, and the overrides.

    Raises:
        RecipeError: there are two arguments without `=`, so two recipes.
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
                hint="give overrides as section.key=value, and data as --data FILE",
            )
    return source, overrides


def _is_recipe(argument: str) -> bool:
    return argument.endswith((".yaml", ".yml")) and Path(argument).is_file()


def _eval_override(text: str) -> Override | str:
    """The override of data.eval. Lists and mappings are read as YAML, all else as plain text."""
    if text.lstrip().startswith(("{", "[")):
        return f"data.eval={text}"
    return Override(("data", "eval"), text, "--eval")
