"""Runs all checks in turn, with as few models in memory as possible."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tunesmith.build.build import build
from tunesmith.build.job import Job, saved_optimizer
from tunesmith.build.parallelize import for_one_process
from tunesmith.checkpoint.folder import load_checkpoint, newest_checkpoint
from tunesmith.config.schema import Recipe
from tunesmith.config.sections.device import DeviceSection
from tunesmith.data.formats.examples import Example
from tunesmith.data.preprocess.document_store import longest_paths
from tunesmith.metrics.environment import machine_record
from tunesmith.storage.machine import read_machine
from tunesmith.storage.run_folder import run_files
from tunesmith.types import Document
from tunesmith.verify.exported import Exported, export_checks, write
from tunesmith.verify.inference import examples, inference_faithful
from tunesmith.verify.layouts import Layouts, layout_checks
from tunesmith.verify.ledger import ledger_adds_up, run_ledger
from tunesmith.verify.outcome import Outcome
from tunesmith.verify.ranks import for_ranks, one_process, ranks_agree
from tunesmith.verify.resumed import resume_bitwise, run_through
from tunesmith.verify.whole import checkpoint_lines
from tunesmith.verify.workload import Bounds, bounded, build_precise, chosen_documents, shortened

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Verification:
    """The table, and what it is about."""

    model: str
    data: list[str]
    outcomes: list[Outcome]
    about: dict[str, Any]  # time, versions, machine, settings, hashes of data and template

    @property
    def holds(self) -> bool:
        return not any(outcome.failed for outcome in self.outcomes)

    def record(self) -> dict[str, Any]:
        """The whole as JSON values."""
        return {
            "holds": self.holds,
            "model": self.model,
            "data": self.data,
            "promises": [outcome.record() for outcome in self.outcomes],
            **self.about,
        }


@dataclass(frozen=True, slots=True)
class _UserRows:
    recipe: Recipe
    bounds: Bounds
    folders: list[Path]
    run: Path | None
    ranks: int
    say: Say
    device: DeviceSection  # as the recipe has it, for several ranks


def verify(
    recipe: Recipe,
    *,
    bounds: Bounds | None = None,
    run: Path | None = None,
    folders: Sequence[Path] = (),
    ranks: int = 1,
    say: Say = lambda _: None,
) -> Verification:
    """Hold every promise against the recipe's model and data on this machine. Nothing is written
    but to a temporary folder.

    Args:
        run: the run whose recipe it is; its own ledger and model are then looked at.
        folders: where data is looked for after the current folder.
        ranks: processes for the line on several ranks; 1 leaves it out.
        say: told what is being done.

    Raises:
        InputError: recipe, data or model are wrong.
    """
    beside = list(folders)
    if run is not None:
        started = read_machine(run).get("folder")
        beside += [run, *([Path(started)] if started else [])]
    given = _UserRows(
        for_one_process(recipe), bounds or Bounds(), beside, run, ranks, say, recipe.device
    )
    outcomes, chosen, longest, about = _untrained(given)
    outcomes += _in_motion(given, chosen, longest)
    order = {promise: number for number, promise in enumerate(("P1", "P2", "P3", "P4", "P5", "P6"))}
    outcomes.sort(key=lambda outcome: order[outcome.promise])
    data = [str(section.path) for section in recipe.data.train]
    return Verification(recipe.model.name, data, outcomes, about)


def _untrained(
    given: _UserRows,
) -> tuple[list[Outcome], tuple[list[Document], list[Example]], int, dict[str, Any]]:
    """What needs no optimizer step: P1 to P4. Also the documents that were chosen, with their
    examples, and the length that short enough documents have.
    """
    given.say("building, with float32 weights if they fit")
    job, precision = build_precise(given.recipe, given.bounds, given.folders)
    with _closed(job):
        given.say(f"P1: {len(job.data.documents)} documents against the chat template")
        outcomes = [inference_faithful(job, given.folders), ledger_adds_up(job, given.folders)]
        if given.run is not None:
            outcomes.append(run_ledger(given.run))
        documents = chosen_documents(job, given.bounds)
        given.say(f"P2, P3: {len(documents)} documents in {precision}")
        outcomes += layout_checks(Layouts(job, documents, precision))
        origins = {document.origin for document in documents}
        found = [e for origin, e in examples(job, given.folders) if origin in origins]
        shortest = int(longest_paths(job.data.documents).min())
        about = _about(job, given.bounds, precision)
    return outcomes, (documents, found), max(given.bounds.tokens, shortest), about


def _in_motion(
    given: _UserRows, chosen: tuple[list[Document], list[Example]], longest: int
) -> list[Outcome]:
    """What needs steps: P5, P6, and several ranks."""
    recipe = shortened(bounded(given.recipe, given.bounds), longest)
    outcomes: list[Outcome] = []

    def anew() -> Job:
        return build(recipe, folders=given.folders)

    with tempfile.TemporaryDirectory(prefix="tunesmith-verify-") as place:
        folder = Path(place) / "run"
        given.say("P5: a short run, saved on the way")
        job = anew()
        with _closed(job):
            run_through(job, folder)
            given.say("P6: the model written and read again")
            subject = _written(given, job, Path(place))
            outcomes += export_checks(subject, *chosen)
            outcomes += checkpoint_lines(subject, chosen[0])
            precise = job.choices.recipe.model.dtype == "float32"
        del job, subject
        gc.collect()
        given.say("P5: the run resumed")
        outcomes.append(resume_bitwise(anew, folder))
        if given.ranks > 1:
            given.say(f"P3: the run on {given.ranks} ranks")
            outcomes.append(
                ranks_agree(
                    for_ranks(recipe, given.device, given.ranks),
                    folder,
                    ranks=given.ranks,
                    folders=given.folders,
                    precise=precise,
                )
            )
        else:
            outcomes.append(one_process())
    return outcomes


def _written(given: _UserRows, job: Job, place: Path) -> Exported:
    """The run's own model with its weights in the job; or the short run's, written now."""
    run = given.run
    if run is None or not run_files(run)["model"].is_dir():
        write(job, place / "model")
        return Exported(job, place / "model", "a model written after the short run")
    checkpoint = newest_checkpoint(run).path
    state = load_checkpoint(checkpoint)
    best = state.meta.get("best")
    if given.recipe.train.result == "best" and best and int(best["step"]) != state.step:
        checkpoint = checkpoint.with_name(f"step-{int(best['step'])}")
        state = load_checkpoint(checkpoint)
    saved_optimizer(job).load(checkpoint, state)
    return Exported(job, run_files(run)["model"], f"model/ of the run, and {checkpoint.name}")


@contextmanager
def _closed(job: Job) -> Iterator[None]:
    try:
        yield
    finally:
        job.training.loss.close()
        job.training.optimizer.zero_grad()


def _about(job: Job, bounds: Bounds, precision: str) -> dict[str, Any]:
    recipe = job.choices.recipe
    return {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine_record(),
        "settings": {
            "rows of each source": bounds.rows,
            "documents of a step": bounds.documents,
            "longest path": bounds.tokens,
            "weights of P2 and P3": precision,
            "dtype": recipe.model.dtype,
            "adapter": recipe.adapter.kind,
            "quantization": recipe.model.quantization,
            "objective": recipe.objective.name,
            "optimizer": recipe.optim.name,
            "device": str(job.training.device),
        },
        "model_commit": job.training.source.commit if job.training.source else None,
        "data_hashes": dict(job.data.prepared.content_hashes),
        "template_sha256": job.data.template.sha256,
    }
