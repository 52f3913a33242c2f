"""The files of a run folder before its first step: recipe, machine, ledger."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.dump import to_plain, to_yaml
from tunesmith.config.schema import Recipe
from tunesmith.distributed.env import launch_id
from tunesmith.storage.atomic import write_json, write_text
from tunesmith.storage.lock import LOCK
from tunesmith.storage.run_files import run_files

if TYPE_CHECKING:
    from tunesmith.build.inputs import UserObjects
    from tunesmith.build.job import Job


def files_read(asked: Recipe, objects: UserObjects, job: Job, beside: Sequence[Path]) -> list[Path]:
    """Files and folders that the run reads."""
    from tunesmith.build.sources import make_sources

    sections = [] if objects.rows is not None else list(asked.data.train)
    if objects.eval_rows is None and isinstance(asked.data.eval, Mapping):
        sections += [section for group in asked.data.eval.values() for section in group]
    sources = make_sources(sections, asked.data, folders=beside)
    paths = [source.path for source in sources if source.path is not None]
    if job.training.source is not None:
        paths += [job.training.source.folder, job.training.source.tokenizer_folder]
    return paths


def remove_unused(path: Path) -> None:
    """Remove a folder that was made for a run which did not come to start."""
    if all(entry.name == LOCK for entry in path.iterdir()):
        shutil.rmtree(path, ignore_errors=True)


def write_start(path: Path, asked: Recipe, job: Job) -> None:
    """What a run is known by; recipe.yaml comes last, since with it the folder counts as a run."""
    from tunesmith.metrics.environment import machine_record

    files = run_files(path)
    machine = {
        **machine_record(),
        "world_size": job.training.world.size,
        "launch": launch_id(),
        "folder": str(Path.cwd()),
        "asked": to_plain(asked),
        "chosen": job.choices.resolved,
        "model_commit": job.training.source.commit if job.training.source else None,
        "data": dict(job.data.prepared.content_hashes),
        "eval": {held.name: held.content_hash for held in job.data.eval_sets},
        "template": {"name": job.data.template.name, "sha256": job.data.template.sha256},
        "rendered_row": job.data.prepared.sample_text,
    }
    job.data.prepared.ledger.save(files["ledger"])
    if job.choices.user_objective is not None:
        machine["objective"] = job.choices.user_objective.sha256
        job.choices.user_objective.keep(path)
    write_json(files["machine"], machine)
    write_text(files["recipe"], to_yaml(job.choices.recipe))
