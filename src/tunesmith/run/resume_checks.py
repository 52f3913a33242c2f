"""Going on with a run: the recipe, the data and the checkpoint it must be the same run by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from tunesmith.storage.run_files import run_files
from tunesmith.train.job import Job
from tunesmith.train.oom_retry import adopt_micro_tokens, read_hint
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
    first = read_recipe(read_json(run_files(path)["machine"])["asked"])
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
        {"the chat template": job.template.sha256},
        hint="put it back, or start anew: tunesmith train RUN/recipe.yaml --out NEW",
    )
    check_same(machine.get("objective"), job.user_objective)
    data = dict(job.prepared.content_hashes)
    held_out = {held.name: held.content_hash for held in job.eval_sets}
    if not changed_data:
        check_unchanged(machine["data"], data)
        check_unchanged(machine["eval"], held_out)
    elif (data, held_out) != (machine["data"], machine["eval"]) and job.world.is_main:
        if job.loss.old_policy is not None:
            raise DataError(
                "psft compares with what the model made of the rows before, so they can't change",
                where=str(path),
                hint="put them back, or start a new run",
            )
        before = [*machine.get("data_before", []), {**machine["data"], **machine["eval"]}]
        write_json(file, {**machine, "data": data, "eval": held_out, "data_before": before})
        job.prepared.ledger.save(run_files(path)["ledger"])


def restore(trainer: Trainer, path: Path, *, progress: bool) -> None:
    """Go on from the newest good checkpoint; a run that was killed before its first one begins
    again.
    """
    checkpoints = run_files(path)["checkpoints"]
    lines: list[str] = []
    if not checkpoints.is_dir() or not any(checkpoints.glob("step-*")):
        lines.append("resume: there is no checkpoint yet, so the run begins again")
        lines += read_hint(trainer.job, path, asked=trainer.meta()["micro_tokens_asked"])
    else:
        found = newest_checkpoint(path)
        meta = load_checkpoint(found.path).meta
        lines += found.warnings
        adopt_micro_tokens(trainer.job, meta)
        lines += read_hint(trainer.job, path, asked=trainer.meta()["micro_tokens_asked"])
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
        if found.step > trainer.job.total_steps:
            raise RunError(
                f"the run has done {found.step} steps, and with this data it has "
                f"{trainer.job.total_steps}",
                where=str(path),
                hint="put the data back, or start a new run from its result: "
                f"tunesmith train --model {path}",
            )
        lines.append(f"resume: from step {found.step}, {exact}")
    if progress:
        announce(lines)
