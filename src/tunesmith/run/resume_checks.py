"""Checks of a resume: the recipe, data, template and checkpoint must be those of the run."""

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
from tunesmith.errors import DataError, RecipeError, RunError
from tunesmith.metrics.console import announce
from tunesmith.storage.atomic import read_json, write_json
from tunesmith.storage.run_folder import run_files
from tunesmith.train.oom_retry import read_hint, saved_micro_tokens
from tunesmith.train.trainer import Trainer
from tunesmith.train.user_objective import check_same

RESUMABLE = ("device", "log", "checkpoint")
"""Sections that a resume may change: none of them decides what is learned."""


def same_recipe(path: Path, asked: Recipe) -> None:
    """Refuse to go on with a run of another recipe.

    Raises:
        RecipeError: a science section differs both from the recipe as asked for then and as
        resolved.
    """
    resolved = read_recipe(run_files(path)["recipe"])
    first = read_recipe(read_json(run_files(path)["machine"])["asked"], of_run=True)
    found = min((_science(differences(old, asked)) for old in (first, resolved)), key=len)
    if found:
        shown = "; ".join(f"{d.key}: {d.old} there, {d.new} here" for d in found[:5])
        raise RecipeError(
            f"the run there has another recipe ({shown})",
            where=str(path),
            hint="give another --out, or --overwrite to start anew",
        )


def _science(found: Sequence[Difference]) -> list[Difference]:
    return [difference for difference in found if difference.section in SCIENCE]


def resumed_recipe(path: Path, overrides: Sequence[str | Override]) -> Recipe:
    """The run's recipe with overrides of the sections a resume may change."""
    old = read_recipe(run_files(path)["recipe"])
    new = read_recipe(run_files(path)["recipe"], overrides)
    for difference in differences(old, new):
        if difference.section not in RESUMABLE:
            raise RecipeError(
                "a resume can't change what is learned or looked at",
                where=difference.key,
                hint=f"tunesmith train --model {path} starts a new run from its result",
            )
    return new


def check_data(path: Path, job: Job, *, changed_data: bool = False) -> None:
    """Refuse to go on with other rows, another template or another objective than before.

    With `changed_data` other rows are taken: the run's machine.json and ledger then have them.

    Raises:
        DataError: names the source that differs.
    """
    file = run_files(path)["machine"]
    machine = read_json(file)
    check_unchanged(
        {"the chat template": machine["template"]["sha256"]},
        {"the chat template": job.data.template.sha256},
        hint="put it back, or start anew: tunesmith train RUN/recipe.yaml --out NEW",
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
                "psft compares with what the model made of the rows before, so they can't change",
                where=str(path),
                hint="put them back, or start a new run",
            )
        before = [*machine.get("data_before", []), {**machine["data"], **machine["eval"]}]
        write_json(file, {**machine, "data": data, "eval": held_out, "data_before": before})
        job.data.prepared.ledger.save(run_files(path)["ledger"])


def _lower_micro_tokens(
    trainer: Trainer, path: Path, meta: Mapping[str, Any] | None = None
) -> list[str]:
    """Start with the `micro_tokens` that fitted before: those of the checkpoint's `meta`, or fewer
    where the last attempt ran out of memory and could not retry.
    """
    asked = trainer.microbatching.micro_tokens
    saved = asked if meta is None else saved_micro_tokens(meta, asked=asked)
    now = read_hint(path, asked=asked, micro_tokens=saved)
    trainer.microbatching = replace(trainer.microbatching, micro_tokens=now)
    if now == saved:
        return []
    return [f"resume: memory ran out with device.micro_tokens={asked}; now it is {now}"]


def restore(trainer: Trainer, path: Path, *, progress: bool) -> None:
    """Go on from the newest good checkpoint; a run that was killed before its first one begins
    again.
    """
    checkpoints = run_files(path)["checkpoints"]
    lines: list[str] = []
    if not checkpoints.is_dir() or not any(checkpoints.glob("step-*")):
        lines.append("resume: there is no checkpoint yet, so the run begins again")
        lines += _lower_micro_tokens(trainer, path)
    else:
        found = newest_checkpoint(path)
        meta = load_checkpoint(found.path).meta
        lines += found.warnings
        lines += _lower_micro_tokens(trainer, path, meta)
        now = trainer.meta()
        unlike = changed(meta, now)
        if meta.get("micro_tokens") != now["micro_tokens"]:
            unlike.append(f"micro_tokens was {meta.get('micro_tokens')}, is {now['micro_tokens']}")
        trainer.restore(found.path)
        if meta.get("data", now["data"]) != now["data"]:
            trainer.rows.forget()
            unlike.append("the rows differ, and rows.parquet begins anew")
            lines.append("resume: the data has changed; order and schedule are the new data's")
        exact = "exact within rounding: " + "; ".join(unlike) if unlike else "exact to the bit"
        if found.step > trainer.training.total_steps:
            raise RunError(
                f"the run has done {found.step} steps, and with this data it has "
                f"{trainer.training.total_steps}",
                where=str(path),
                hint="put the data back, or start a new run from its result: "
                f"tunesmith train --model {path}",
            )
        lines.append(f"resume: from step {found.step}, {exact}")
    if progress:
        announce(lines)
