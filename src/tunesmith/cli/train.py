"""`tunesmith train` and `tunesmith resume`: run a training, in one process or one a device."""

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
from tunesmith.display import put


def train(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval: EvalOption = None,
    out: Annotated[
        str | None, typer.Option(help="Run folder. By default a new folder in runs/.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or start it if new.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in --out and start a new one.")
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
        # Each rank runs the same command line; this process only starts them and waits.
        options = [("--model", model), *(("--data", file) for file in data or ()), ("--eval", eval)]
        words = [word for pair in [*options, ("--out", out)] if pair[1] for word in pair if word]
        words += ["--resume"] * resume + ["--overwrite"] * overwrite
        return start(count, ["train", *(arguments or ()), *words])
    run = train_recipe(recipe, out=out, resume=resume, overwrite=overwrite, recipe_file=source)
    if is_main_process():
        put(run.model_folder)
    return None


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION.KEY=VALUE]...",
            help="Overrides of keys under device, log or checkpoint.",
        ),
    ] = None,
    changed_data: Annotated[
        bool, typer.Option("--changed-data", help="Accept rows that changed since the run began.")
    ] = False,
) -> int | None:
    """Continue a run from its newest undamaged checkpoint."""
    from tunesmith.distributed.env import is_main_process
    from tunesmith.distributed.spawn import start
    from tunesmith.run import ranks_of
    from tunesmith.run import resume as resume_run

    count = ranks_of(run, overrides or ())
    if count > 1:
        return start(count, ["resume", run, *(overrides or ())])
    finished = resume_run(run, overrides=overrides or (), changed_data=changed_data)
    if is_main_process():
        put(finished.model_folder)
    return None
