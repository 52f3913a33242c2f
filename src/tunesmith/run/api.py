"""The Python API: `train`, `resume`, and their arguments as a recipe."""

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
from tunesmith.run.runner import Run, conduct
from tunesmith.storage.atomic import read_json
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
    """Fine-tune a model and leave a run folder with the result.

    `recipe` is a file, a mapping or a Recipe; keywords go over it. `model` is a name, a section of
    the recipe, or a transformers or peft model (then with its `tokenizer`). `data` and `eval` are
    paths, or any iterables of dicts; `eval` may also be a share of the rows (`"2%"`) or a number.
    `sections` change the recipe: `optim={"lr": 1e-4}`, `adapter="lora"`. `out` names the run
    folder; with `resume` one with the same recipe is gone on with, with `overwrite` it is replaced.

    Raises:
        InputError: recipe, data or model are wrong; nothing was trained.
        RunError: the run failed; its checkpoints stay.
        InterruptedRun: a signal stopped it after it saved.
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
    asked = read_recipe(recipe, changes, held_out_rows=given.eval_rows is not None, **sections)
    if given.rows is None and not asked.data.train:
        raise RecipeError(
            "no data to learn from", where="data.train", hint="give --data FILE, or data.train"
        )
    return train_recipe(
        asked,
        out=out,
        resume=resume,
        overwrite=overwrite,
        objects=given,
        recipe_file=recipe,
        progress=progress,
    )


def train_recipe(
    asked: Recipe,
    *,
    out: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    objects: UserObjects | None = None,
    recipe_file: RecipeSource = None,
    progress: bool = True,
) -> Run:
    """What `train` does once the recipe has been read; data is also looked for beside
    `recipe_file`.
    """
    from tunesmith.build.inputs import UserObjects
    from tunesmith.model.load import settings_kept

    world = _connect(asked)
    path = None if out is None else Path(out)
    if world.restarted:  # by torchrun: what there is of the run is its own
        resume, overwrite, path = True, False, path or launched_run(launch_id())
    folder = _open(
        world,
        lambda: open_run(
            path,
            model_name=asked.model.name,
            resume=resume,
            overwrite=overwrite,
        ),
    )
    objects = objects or UserObjects()
    with folder, settings_kept(objects.model):
        if folder.resumed:
            from tunesmith.run.resume_checks import same_recipe

            same_recipe(folder.path, asked)
        beside = _recipe_folders(recipe_file)
        return conduct(folder, asked, objects, world=world, beside=beside, progress=progress)


def _connect(asked: Recipe) -> World:
    """The ranks that this process is one of.

    Raises:
        RecipeError: more than one is asked for, and this process was started alone.
    """
    world = connect(asked.device.kind, timeout_minutes=asked.device.rank_timeout)
    if world.is_single and asked.device.ranks not in ("auto", 1):
        raise RecipeError(
            f"a call from Python runs on one rank, not on {asked.device.ranks}",
            where="device.ranks",
            hint="`tunesmith train` and `resume` start as many, and torchrun for a script",
        )
    return world


def _open(world: World, open_first: Callable[[], RunFolder]) -> RunFolder:
    """The run's folder; the first rank alone makes and holds it."""
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
    """Go on with a run from its newest good checkpoint; overrides may change `device`, `log` and
    `checkpoint` only. Rows that are no longer what they were are refused but for `changed_data`.

    Raises:
        InputError: not a run, another process trains in it, or an override changes what is learned.
        RunError, InterruptedRun: as `train`.
    """
    from tunesmith.build.inputs import UserObjects

    path = Path(run)
    asked = _resumed(path, overrides)
    world = _connect(asked)
    with _open(world, lambda: open_run(path, model_name=asked.model.name, resume=True)) as folder:
        beside = _recipe_folders(path)
        return conduct(
            folder, asked, UserObjects(),
            world=world, beside=beside, changed_data=changed_data, progress=progress,
        )  # fmt: skip


def ranks_of(run: str | PathLike[str], overrides: Sequence[str | Override] = ()) -> int:
    """How many ranks a resume of the run should be started on, on this machine."""
    device = _resumed(Path(run), overrides).device
    return ranks_to_start(device.kind, device.ranks)


def _resumed(path: Path, overrides: Sequence[str | Override]) -> Recipe:
    if not is_run(path):
        raise InputError(
            "this is not a run",
            where=str(path),
            hint="a run folder has recipe.yaml and machine.json",
        )
    from tunesmith.run.resume_checks import resumed_recipe

    return resumed_recipe(path, overrides)


def _rows_or_override(data: Any, key: str, changes: list[str | Override]) -> Any:
    """Rows given as objects; what the recipe can name becomes an override instead."""
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
    """Where data may lie besides the current folder: beside the recipe, and where its run was
    started.
    """
    if not isinstance(recipe, str | PathLike):
        return []
    path = Path(recipe)
    folder = path if path.is_dir() else path.parent
    folders = [folder]
    if (folder / "machine.json").is_file():
        started = read_json(folder / "machine.json").get("folder")
        folders += [Path(started)] if started else []
    return folders
