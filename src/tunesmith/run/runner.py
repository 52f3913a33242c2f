"""Run driver: builds the job, trains it, and writes the model, with the files of the run folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config.dump import to_plain, to_yaml
from tunesmith.config.schema import Recipe
from tunesmith.distributed.env import launch_id
from tunesmith.distributed.world import World
from tunesmith.storage.atomic import write_json, write_text, writing_result
from tunesmith.storage.lock import LOCK
from tunesmith.storage.run_folder import RunFolder, run_files

if TYPE_CHECKING:
    from tunesmith.build.inputs import UserObjects
    from tunesmith.build.job import Job


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a finished run."""

    folder: Path
    model_folder: Path
    steps: int
    metrics: Mapping[str, float]  # last training loss, and held-out metrics by set: `eval/nll`, ...
    model: Any  # the trained transformers or peft model
    tokenizer: Any


def run_training(
    folder: RunFolder,
    requested: Recipe,
    objects: UserObjects,
    *,
    world: World,
    data_folders: Sequence[Path],
    changed_data: bool = False,
    progress: bool,
) -> Run:
    """Build the job of a recipe, train it and write its model.

    torch is imported here and not at the top of the module, so that an error in the recipe is shown
    at once.
    """
    from tunesmith.build.build import build
    from tunesmith.metrics.console import announce
    from tunesmith.model import compile as compiled
    from tunesmith.model.kernels import replace as kernels

    path = folder.path
    faults = path.with_name(f"{path.name}-faults.jsonl")
    try:
        job = build(
            requested, objects=objects, folders=data_folders, faults_file=faults, world=world
        )
        if not folder.resumed and world.is_main:
            folder.clear(files_read(requested, objects, job, data_folders))
    except BaseException:
        if not folder.resumed and world.is_main:
            remove_unused(path)
        raise
    progress = progress and world.is_main
    if progress:
        announce([f"run: {path}", *folder.notes, *job.choices.notes])
    if folder.resumed:
        from tunesmith.run.resume_checks import check_data

        check_data(path, job, changed_data=changed_data)
    elif world.is_main:
        write_start(path, requested, job)
    model = job.training.model
    # The model may belong to the caller, so hooks and replaced modules are removed from it.
    with (
        closing(job.training.loss), kernels.SWAP.restoring(model), compiled.SWAP.restoring(model),
    ):  # fmt: skip
        return _train_and_export(folder, job, progress=progress)


def _train_and_export(folder: RunFolder, job: Job, *, progress: bool) -> Run:
    from tunesmith.build.job import make_trainer
    from tunesmith.checkpoint.folder import clean_checkpoints, prune_checkpoints
    from tunesmith.run.result import sampler, take_best, write_result
    from tunesmith.run.resume_checks import restore

    path, files = folder.path, run_files(folder.path)
    if job.training.world.is_main:
        clean_checkpoints(path)
    job.training.world.barrier()
    trainer = make_trainer(job, path)
    if folder.resumed:
        restore(trainer, path, progress=progress)
        if job.training.world.is_main and trainer.step:
            found = trainer.evaluations.best
            best = int(found["step"]) if found else None
            keep = job.choices.recipe.checkpoint.keep
            prune_checkpoints(path, trainer.step, keep=keep, best=best)
    # The files are cut back to the checkpoint's step. A run that starts at step 0 evaluates before
    # its first step, so the records of step 0 are removed too (-1), or they would be there twice.
    kept = trainer.step or -1
    sinks: list[Any] = []
    samples = None
    if job.training.world.is_main:
        sinks = _sinks(folder, job, after_step=kept if folder.resumed else None, progress=progress)
        samples = sampler(job, files["samples"], after_step=kept)
    trainer.sinks, trainer.evaluations.on_eval = sinks, samples
    try:
        trainer.fit()
    except BaseException:
        for sink in sinks:
            # The error that stopped the run must reach the user, not one of closing a file.
            with suppress(Exception):
                sink.close()
        raise
    for sink in sinks:
        sink.close()
    take_best(trainer, job)
    if job.training.grad_sync.sharded is not None:
        job.training.grad_sync.sharded.gather_model()
    metrics: Mapping[str, float] = {}
    if job.training.world.is_main:
        with writing_result(path):
            trainer.rows.write(files["rows"], job.data.documents, job.data.sampler.epoch_of)
            metrics = write_result(path, job)
    job.training.world.store_barrier()
    metrics = job.training.world.broadcast_object(metrics)
    return Run(
        path,
        files["model"],
        job.training.total_steps,
        metrics,
        job.training.model.model,
        job.data.template.tokenizer,
    )


def _sinks(folder: RunFolder, job: Job, *, after_step: int | None, progress: bool) -> list[Any]:
    from tunesmith.metrics.console import ConsoleSink
    from tunesmith.metrics.records import JsonlSink
    from tunesmith.metrics.trackers import TrackedRun, open_tracker

    tracked = TrackedRun(
        folder=folder.path,
        project=job.choices.recipe.log.project,
        settings=to_plain(job.choices.recipe),
        resumed=folder.resumed,
    )
    sinks: list[Any] = [JsonlSink(run_files(folder.path)["metrics"], after_step=after_step)]
    sinks += [open_tracker(name, tracked) for name in job.choices.recipe.log.to]
    if progress:
        sinks.append(ConsoleSink(job.training.total_steps, done_steps=after_step or 0))
    return sinks


def files_read(
    requested: Recipe, objects: UserObjects, job: Job, data_folders: Sequence[Path]
) -> list[Path]:
    """Files and folders that the run reads: its data and its model."""
    from tunesmith.build.sources import make_sources

    sections = [] if objects.rows is not None else list(requested.data.train)
    if objects.eval_rows is None and isinstance(requested.data.eval, Mapping):
        sections += [section for group in requested.data.eval.values() for section in group]
    sources = make_sources(sections, requested.data, folders=data_folders)
    paths = [source.path for source in sources if source.path is not None]
    if job.training.source is not None:
        paths += [job.training.source.folder, job.training.source.tokenizer_folder]
    return paths


def remove_unused(path: Path) -> None:
    """Remove the folder of a run that failed before its start, if nothing but the lock is in it."""
    if all(entry.name == LOCK for entry in path.iterdir()):
        shutil.rmtree(path, ignore_errors=True)


def write_start(path: Path, requested: Recipe, job: Job) -> None:
    """Write the files by which a run is known: ledger.json, machine.json and recipe.yaml.

    recipe.yaml is last, since a folder with it counts as a run that can be resumed.
    """
    from tunesmith.metrics.environment import machine_record

    files = run_files(path)
    machine = {
        **machine_record(),
        "world_size": job.training.world.size,
        "launch": launch_id(),
        "folder": str(Path.cwd()),
        "asked": to_plain(requested),
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
