"""Checks before a resume: recipe, data and template must be those of the run's start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.build.job import Job
from tunesmith.build.sources import check_unchanged
from tunesmith.checkpoint.folder import differences as changed
from tunesmith.checkpoint.folder import load_checkpoint, newest_checkpoint
from tunesmith.config.dump import Difference, differences
from tunesmith.config.overrides import Override
from tunesmith.config.read import read_recipe
from tunesmith.config.schema import SCIENCE, Recipe
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.errors import DataError, RecipeError, RunError, first_line
from tunesmith.metrics.console import announce
from tunesmith.storage.atomic import write_json
from tunesmith.storage.machine import read_machine
from tunesmith.storage.run_folder import run_files
from tunesmith.train.oom_retry import read_hint, saved_micro_tokens
from tunesmith.train.trainer import Trainer
from tunesmith.train.user_objective import check_same

RESUMABLE = ("device", "log", "checkpoint")
"""Sections that a resume may change, since none of them decides what is learned."""


def same_recipe(path: Path, requested: Recipe) -> None:
    """Check that the recipe is that of the run in the folder.

    It may equal the run's recipe as it was given, or as it was resolved (with all defaults set).

    Raises:
        RecipeError: a section that decides what is learned differs from both.
    """
    resolved = read_recipe(run_files(path)["recipe"])
    first = read_recipe(read_machine(path)["asked"], of_run=True)
    found = min((_science(differences(old, requested)) for old in (first, resolved)), key=len)
    if found:
        shown = "; ".join(f"{d.key}: {d.old} in the run, {d.new} now" for d in found[:5])
        raise RecipeError(
            f"the run in this folder has another recipe ({shown})",
            where=str(path),
            hint="give another --out, or --overwrite to delete that run and start a new one",
        )


def _science(found: Sequence[Difference]) -> list[Difference]:
    return [difference for difference in found if difference.section in SCIENCE]


def resumed_recipe(path: Path, overrides: Sequence[str | Override]) -> Recipe:
    """The run's recipe with the overrides.

    Raises:
        RecipeError: an override changes a section that a resume may not change.
    """
    old = read_recipe(run_files(path)["recipe"])
    new = read_recipe(run_files(path)["recipe"], overrides)
    for difference in differences(old, new):
        if difference.section not in RESUMABLE:
            raise RecipeError(
                f"a resume may change only the sections {', '.join(RESUMABLE)}",
                where=difference.key,
                hint=f"tunesmith train --model {path} starts a new run from its result",
            )
    return new


def check_data(path: Path, job: Job, *, changed_data: bool = False) -> None:
    """Check that rows, chat template and objective are those with which the run started.

    With `changed_data` other rows are accepted, and machine.json and the ledger are updated.

    Raises:
        DataError: a source, the template or the objective differs.
    """
    file = run_files(path)["machine"]
    machine = read_machine(path)
    check_unchanged(
        {"the chat template": machine["template"]["sha256"]},
        {"the chat template": job.data.template.sha256},
        hint="restore it, or start a new run: tunesmith train RUN/recipe.yaml --out NEW",
    )
    check_same(machine.get("objective"), job.choices.user_objective)
    data = dict(job.data.prepared.content_hashes)
    held_out = {held.name: held.content_hash for held in job.data.eval_sets}
    if not changed_data:
        check_unchanged(machine["data"], data)
        check_unchanged(machine["eval"], held_out)
    elif (data, held_out) != (machine["data"], machine["eval"]) and job.training.world.is_main:
        if job.training.loss.old_policy is not None:
            raise DataError(
                "the rows have changed, and psft needs the probabilities that the model gave them "
                "at the start of the run",
                where=str(path),
                hint="restore the rows, or start a new run",
            )
        before = [*machine.get("data_before", []), {**machine["data"], **machine["eval"]}]
        write_json(file, {**machine, "data": data, "eval": held_out, "data_before": before})
        job.data.prepared.ledger.save(run_files(path)["ledger"])
    _mend_ledger(path, job)


def _mend_ledger(path: Path, job: Job) -> None:
    """Write the ledger again if the file is damaged: the rows, which are unchanged, give it."""
    file = run_files(path)["ledger"]
    try:
        Ledger.load(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if job.training.world.is_main:
            job.data.prepared.ledger.save(file)
            announce([f"resume: {file} was damaged ({first_line(error)}), and is written again"])


def _lower_micro_tokens(
    trainer: Trainer, path: Path, meta: Mapping[str, Any] | None = None
) -> list[str]:
    """Start with a `micro_tokens` that fitted into memory before; returns a line on it.

    It is that of the checkpoint's `meta`, or less if the last attempt ran out of memory and could
    not retry.
    """
    retry = trainer.oom_retry
    requested = retry.requested
    saved = requested if meta is None else saved_micro_tokens(meta, asked=requested)
    now = read_hint(path, asked=requested, micro_tokens=saved)
    retry.cut = replace(retry.cut, micro_tokens=now)
    if now == saved:
        return []
    return [f"resume: memory ran out with device.micro_tokens={requested}, so it is now {now}"]


def restore(trainer: Trainer, path: Path, *, progress: bool) -> None:
    """Restore the trainer from the newest undamaged checkpoint and print what was restored.

    A run without a checkpoint starts from the beginning.

    Raises:
        RunError: the run has done more steps than it has with the changed data.
    """
    checkpoints = run_files(path)["checkpoints"]
    lines: list[str] = []
    if not checkpoints.is_dir() or not any(checkpoints.glob("step-*")):
        lines.append("resume: there is no checkpoint yet, so the run starts from the beginning")
        lines += _lower_micro_tokens(trainer, path)
    else:
        found = newest_checkpoint(path)
        meta = load_checkpoint(found.path).meta
        lines += found.warnings
        lines += _lower_micro_tokens(trainer, path, meta)
        now = trainer.meta()
        unlike = changed(meta, now)
        if meta.get("micro_tokens") != now["micro_tokens"]:
            unlike.append(
                f"micro_tokens was {meta.get('micro_tokens')} and is {now['micro_tokens']}"
            )
        trainer.restore(found.path)
        if meta.get("data", now["data"]) != now["data"]:
            trainer.rows.forget()
            unlike.append("the rows differ, and rows.parquet starts empty")
            lines.append(
                "resume: the data has changed; the order of the rows and the learning rate "
                "schedule are now those of the new data"
            )
        exact = "exact within rounding: " + "; ".join(unlike) if unlike else "exact to the bit"
        if found.step > trainer.training.total_steps:
            raise RunError(
                f"the run has done {found.step} steps, and with this data it would have only "
                f"{trainer.training.total_steps}",
                where=str(path),
                hint="restore the data, or start a new run from the result: "
                f"tunesmith train --model {path}",
            )
        lines.append(f"resume: from step {found.step}, {exact}")
    if progress:
        announce(lines)
