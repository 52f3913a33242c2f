"""`tunesmith train`: fine-tune a model."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.inputs import (
    Arguments,
    DataOption,
    EvalOption,
    ModelOption,
    recipe_from_arguments,
)


def train(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval: EvalOption = None,
    out: Annotated[
        str | None, typer.Option(help="The run's folder; a new one under runs/ by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on if the folder has this run, else start it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that is in the folder.")
    ] = False,
) -> int | None:
    """Fine-tune a model on demonstrations."""
    from tunesmith.cli.inputs import split_arguments
    from tunesmith.distributed.env import is_main_process
    from tunesmith.distributed.spawn import ranks_to_start, start
    from tunesmith.run import train_recipe

    recipe = recipe_from_arguments(arguments, model, data, eval)
    source, _ = split_arguments(arguments or ())
    count = ranks_to_start(recipe.device.kind, recipe.device.ranks)
    if count > 1:
        options = [("--model", model), *(("--data", file) for file in data or ()), ("--eval", eval)]
        words = [word for pair in [*options, ("--out", out)] if pair[1] for word in pair if word]
        words += ["--resume"] * resume + ["--overwrite"] * overwrite
        return start(count, ["train", *(arguments or ()), *words])
    run = train_recipe(recipe, out=out, resume=resume, overwrite=overwrite, recipe_file=source)
    if is_main_process():
        print(run.model_folder)
    return None
