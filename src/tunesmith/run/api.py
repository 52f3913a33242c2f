"""Python API: `train` and `resume`, with keyword arguments as overrides of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.overrides import Override
from tunesmith.config.read import RecipeSource, read_recipe
from tunesmith.config.schema import Recipe
from tunesmith.distributed.env import launch_id
from tunesmith.distributed.spawn import ranks_to_start
from tunesmith.distributed.world import World, connect
from tunesmith.errors import InputError, RecipeError
from tunesmith.run.runner import Run, run_training
from tunesmith.storage.machine import read_machine
from tunesmith.storage.run_folder import RunFolder, is_run, launched_run, open_run

if TYPE_CHECKING:
    from tunesmith.build.inputs import UserObjects


Data = str | PathLike[str] | Sequence[str] | Iterable[Mapping[str, Any]]


def train(
    recipe: RecipeSource = None,
    *,
    model: Any = None,
    data: Data | None = None,
    eval: Data | int | None = None,
    out: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tokenizer: Any = None,
    overrides: Sequence[str | Override] = (),
    progress: bool = True,
    **sections: Any,
) -> Run:
    """Fine-tune a model and write a run folder with the result.

    Args:
        recipe: a recipe file, a mapping or a Recipe. The other arguments override it.
        model: a model name, a section of the recipe, or a transformers or peft model. A model
            object needs its `tokenizer` too.
        data: paths of files, or an iterable of dicts.
        eval: as `data`, or a share of the training rows (`"2%"`), or a number of them.
        out: the run folder. By default a new folder under `runs/`.
        resume: if `out` holds a run with the same recipe, continue it from its newest checkpoint;
            if it holds none, start it.
        overwrite: if `out` holds a run, delete it and start a new one.
        tokenizer: the tokenizer of a model object.
        overrides: `section.key=value` texts, as on the command line.
        progress: print progress to stderr.
        sections: sections of the recipe: `optim={"lr": 1e-4}`, `adapter="lora"`.

    Raises:
        InputError: recipe, data or model are wrong. Nothing was trained.
        RunError: the run failed. Its checkpoints stay.
        InterruptedRun: a signal stopped the run after it had saved a checkpoint.
    """
    from tunesmith.build.inputs import UserObjects

    given = UserObjects(tokenizer=tokenizer)
    changes: list[str | Override] = list(overrides)
    if isinstance(model, Mapping):
        sections["model"], model = model, None
    if model is not None and not isinstance(model, str | PathLike):
        given.model = model
        model = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "model")
    if model is not None:
        changes.insert(0, Override(("model", "name"), str(model), "model="))
    given.rows = _rows_or_override(data, "train", changes)
    given.eval_rows = _rows_or_override(eval, "eval", changes)
    requested = read_recipe(recipe, changes, held_out_rows=given.eval_rows is not None, **sections)
    if given.rows is None and not requested.data.train:
        raise RecipeError(
            "no data to learn from",
            where="data.train",
            hint="give --data FILE, or set data.train in the recipe",
        )
    return train_recipe(
        requested,
        out=out,
        resume=resume,
        overwrite=overwrite,
        objects=given,
        recipe_file=recipe,
        progress=progress,
    )


def train_recipe(
    requested: Recipe,
    *,
    out: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    objects: UserObjects | None = None,
    recipe_file: RecipeSource = None,
    progress: bool = True,
) -> Run:
    """Run a recipe that has been read already; arguments as for `train`.

    Relative data paths are looked for in the current folder and in that of `recipe_file`.
    """
    from tunesmith.build.inputs import UserObjects
    from tunesmith.model.load import settings_kept

    world = _connect(requested)
    path = None if out is None else Path(out)
    if world.restarted:
        # torchrun has restarted the ranks after a failure, so a run of this launch in the folder is
        # this run, and must be continued and not overwritten.
        resume, overwrite, path = True, False, path or launched_run(launch_id())
    _check_before_folder(requested, world)
    folder = _open(
        world,
        lambda: open_run(
            path,
            model_name=requested.model.name,
            resume=resume,
            overwrite=overwrite,
        ),
    )
    objects = objects or UserObjects()
    with folder, settings_kept(objects.model):
        if folder.resumed:
            from tunesmith.run.resume_checks import same_recipe

            same_recipe(folder.path, requested)
        data_folders = _recipe_folders(recipe_file)
        return run_training(
            folder, requested, objects, world=world, data_folders=data_folders, progress=progress
        )


def _connect(requested: Recipe) -> World:
    """The process group of this process.

    Raises:
        RecipeError: device.ranks is above 1, and this process was started alone.
    """
    world = connect(requested.device.kind, timeout_minutes=requested.device.rank_timeout)
    if world.is_single and requested.device.ranks not in ("auto", 1):
        raise RecipeError(
            f"a call from Python runs in one process, and device.ranks is {requested.device.ranks}",
            where="device.ranks",
            hint="use `tunesmith train` or `tunesmith resume`, or start your script with torchrun",
        )
    return world


def _check_before_folder(requested: Recipe, world: World) -> None:
    """What can be known before there is a run folder, so that a failed start leaves none."""
    from tunesmith.metrics.trackers import check_trackers

    if world.is_main:
        check_trackers(requested.log.to)


def _open(world: World, open_first: Callable[[], RunFolder]) -> RunFolder:
    """The run folder. Only the main process creates and locks it; the others get its path."""
    if world.is_single:
        return open_first()
    folder = open_first() if world.is_main else None
    path, resumed = world.broadcast_object(
        None if folder is None else (str(folder.path), folder.resumed)
    )
    return folder or RunFolder(Path(path), resumed=resumed, lock=None)


def resume(
    run: str | PathLike[str],
    *,
    overrides: Sequence[str | Override] = (),
    changed_data: bool = False,
    progress: bool = True,
) -> Run:
    """Continue a run from its newest undamaged checkpoint.

    Args:
        run: the run folder.
        overrides: `section.key=value` texts of the sections `device`, `log` and `checkpoint`.
        changed_data: accept rows that differ from those of the run. Without it they are an error.
        progress: print progress to stderr.

    Raises:
        InputError: the folder is not a run, another process trains in it, the rows have changed, or
            an override is of another section.
        RunError: the run failed. Its checkpoints stay.
        InterruptedRun: a signal stopped the run after it had saved a checkpoint.
    """
    from tunesmith.build.inputs import UserObjects

    path = Path(run)
    requested = _resumed(path, overrides)
    world = _connect(requested)
    _check_before_folder(requested, world)
    with _open(
        world, lambda: open_run(path, model_name=requested.model.name, resume=True)
    ) as folder:
        data_folders = _recipe_folders(path)
        return run_training(
            folder, requested, UserObjects(),
            world=world, data_folders=data_folders, changed_data=changed_data, progress=progress,
        )  # fmt: skip


def ranks_of(run: str | PathLike[str], overrides: Sequence[str | Override] = ()) -> int:
    """The number of processes with which to resume the run on this machine."""
    device = _resumed(Path(run), overrides).device
    return ranks_to_start(device.kind, device.ranks)


def _resumed(path: Path, overrides: Sequence[str | Override]) -> Recipe:
    if not is_run(path):
        raise InputError(
            "this folder is not a run",
            where=str(path),
            hint="give a run folder; it has the files recipe.yaml and machine.json",
        )
    from tunesmith.run.resume_checks import resumed_recipe

    return resumed_recipe(path, overrides)


def _rows_or_override(data: Any, key: str, changes: list[str | Override]) -> Any:
    """The rows if they are given as objects, else None and an override of data.train or data.eval.

    Paths, shares, numbers and mappings of set names to paths become an override.
    """
    if data is None:
        return None
    named = isinstance(data, str | PathLike | int)
    if not named and isinstance(data, Sequence):
        named = all(isinstance(item, str | PathLike) for item in data) and len(data) > 0
    if isinstance(data, Mapping) and key == "eval":
        named = all(
            not isinstance(value, Mapping) for value in data.values()
        ) and "column_names" not in dir(data)
    if not named:
        return data
    value = [str(item) for item in data] if isinstance(data, list | tuple) else data
    value = str(value) if isinstance(value, PathLike) else value
    changes.append(Override(("data", key), value, f"{'data' if key == 'train' else key}="))
    return None


def _recipe_folders(recipe: RecipeSource) -> list[Path]:
    """Folders, after the current one, in which relative data paths are looked for.

    They are the folder of the recipe, and if that is a run, the folder in which it was started.
    """
    if not isinstance(recipe, str | PathLike):
        return []
    path = Path(recipe)
    folder = path if path.is_dir() else path.parent
    folders = [folder]
    if (folder / "machine.json").is_file():
        started = read_machine(folder).get("folder")
        folders += [Path(started)] if started else []
    return folders
