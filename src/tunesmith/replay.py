"""Replay of one training step from the nearest checkpoint before it.

The run folder is not changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.build.build import build
from tunesmith.build.job import Job, make_trainer
from tunesmith.build.parallelize import for_one_process
from tunesmith.checkpoint.folder import differences, find_damage, load_checkpoint
from tunesmith.checkpoint.rng import capture_rng, restore_rng
from tunesmith.config.overrides import Override
from tunesmith.config.read import read_recipe
from tunesmith.config.renamed import translated
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.errors import InputError
from tunesmith.metrics.records import read_records
from tunesmith.run.resume_checks import check_data
from tunesmith.storage.machine import read_machine
from tunesmith.storage.run_folder import is_run, run_files
from tunesmith.train.anomaly.guard import Guard
from tunesmith.train.anomaly.incident import number_or_text, ranked
from tunesmith.train.trainer import Trainer
from tunesmith.types import Document

COMPARED = ("loss", "grad_norm", "target_tokens", "computed_tokens", "lr")
"""Values of a step's record in metrics.jsonl that a replay must reproduce to the bit."""

Status = Callable[[str], None]
"""Called with a line on what is being done."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A replayed step, and the run's record of it."""

    step: int
    start: int  # step of the checkpoint from which it was reached, 0 for the beginning
    now: dict[str, Any]  # loss, grad_norm, ...; text if not finite
    then: dict[str, Any] | None  # the same from metrics.jsonl; None if it has no such step
    documents: list[dict[str, Any]]  # row, tokens, targets, loss, weight; the highest loss first
    unlike: list[str]  # differences from the run's environment that can change the bits
    notes: list[str]  # damaged checkpoints that were skipped

    @property
    def equal(self) -> bool | None:
        """True if all numbers equal the run's to the bit; None if metrics.jsonl has none."""
        if self.then is None:
            return None
        return all(self.now[name] == value for name, value in self.then.items())

    def record(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "step": self.step,
            "from_checkpoint": self.start,
            "equal": self.equal,
            "now": self.now,
            "then": self.then,
            "unlike": self.unlike,
            "notes": self.notes,
            "documents": self.documents,
        }


def replay(
    run: Path, step: int, *, gradients: bool = False, on_status: Status = lambda _: None
) -> Replay:
    """Repeat step `step`, counted from 1, of a run.

    With `gradients` each document also gets the norm of its part of the step's gradient.

    Raises:
        InputError: the folder is not a run, there is no such step, the data has changed, or the
            gradients of single documents are not defined (`objective.router_aux`).
    """
    if not is_run(run):
        raise InputError(
            "this folder is not a run",
            where=str(run),
            hint="give a run folder; it has the files recipe.yaml and machine.json",
        )
    machine = read_machine(run)
    start, notes = _nearest(run, step)
    meta = load_checkpoint(start).meta if start is not None else _meta_of_start(machine)
    with _threads(meta), tempfile.TemporaryDirectory(prefix="tunesmith-replay-") as place:
        job = _build(run, machine, meta)
        try:
            check_data(run, job)
            if step > job.training.total_steps:
                raise InputError(
                    f"the run has only {job.training.total_steps} steps",
                    where=f"{run} --step {step}",
                )
            if gradients and job.training.loss.balance is not None:
                raise InputError(
                    "with objective.router_aux the loss depends on all documents of a step "
                    "together, so a single document has no gradient of its own",
                    where="--gradients",
                    hint="leave out --gradients",
                )
            trainer = _trainer(job, Path(place), start)
            begin = "the beginning" if start is None else start.name
            on_status(f"replaying {step - trainer.step} steps from {begin}")
            return _replayed(
                run, trainer, step, unlike=_unlike(meta, trainer), notes=notes, gradients=gradients
            )
        finally:
            job.training.loss.close()


def _trainer(job: Job, place: Path, start: Path | None) -> Trainer:
    trainer = make_trainer(job, place)
    # The step may have stopped the run by a spike or a NaN. The replay must not stop there, so its
    # guard has no limits.
    trainer.guard = Guard(
        place, job.data.template.decode, non_finite="skip", patience=None,
        limits={"loss": None, "grad_norm": None},
    )  # fmt: skip
    if start is not None:
        trainer.restore(start)
    return trainer


def _unlike(meta: Mapping[str, Any], trainer: Trainer) -> list[str]:
    """Differences from the run's environment (versions, threads, ...) that can change the bits."""
    now = trainer.meta()
    known = {name: now["versions"].get(name, "absent") for name in meta["versions"]}
    lines = differences(meta, {**now, "versions": known})
    if meta["micro_tokens"] != now["micro_tokens"]:
        lines.append(f"micro_tokens was {meta['micro_tokens']} and is {now['micro_tokens']}")
    return lines


def _replayed(
    run: Path,
    trainer: Trainer,
    step: int,
    *,
    unlike: list[str],
    notes: list[str],
    gradients: bool,
) -> Replay:
    data, first = trainer.data, trainer.step
    documents = [data.documents[int(i)] for i in data.sampler.step_indices(step - 1)]
    norms: list[float] | None = None
    if gradients:
        trainer.advance_to(step - 1)
        norms = _document_gradient_norms(trainer, documents)
    trainer.advance_to(step)
    result = trainer.guard.last
    assert result is not None
    rows = [
        {
            "row": entry["row"],
            "tokens": document.tokens,
            "targets": document.target_tokens,
            "loss": entry["loss"],
            "weight": entry["weight_sum"],
            **({} if norms is None else {"grad_norm": number_or_text(norms[number])}),
        }
        for number, document, entry in ranked(documents, result)
    ]
    now = {
        "loss": number_or_text(result.loss),
        "grad_norm": number_or_text(result.grad_norm),
        "target_tokens": result.target_tokens,
        "computed_tokens": result.computed_tokens,
        "lr": trainer.training.lr(step - 1),
    }
    return Replay(step, first, now, _recorded(run, step), rows, unlike, notes)


def _document_gradient_norms(trainer: Trainer, documents: Sequence[Document]) -> list[float]:
    """The norm of each document's part of the step's gradient; the weights do not change.

    Random numbers (dropout, noise) differ from those in the step.
    """
    training, cut = trainer.training, trainer.oom_retry.cut
    model, device = training.model, training.device
    kept = capture_rng()
    total = sum(float(s.weight.sum(dtype=np.float64)) for d in documents for s in d.segments)
    training.loss.begin(model, trainer.step, trainer.planned, device)
    norms: list[float] = []
    for document in documents:
        plans = plan_step(
            [document], micro_tokens=cut.micro_tokens, share_prefixes=cut.share_prefixes,
            unpacked=model.unpacked,
        )  # fmt: skip
        for plan in plans:
            (training.loss(model, plan, device).loss_sum / total).backward()
        norms.append(float(training.optimizer.grad_norm()))
        training.optimizer.zero_grad()
    restore_rng(kept)
    return norms


def _nearest(run: Path, step: int) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint before a step (None: the beginning), and notes on others."""
    folder = run_files(run)["checkpoints"]
    entries = folder.glob("step-*") if folder.is_dir() else ()
    numbers = {
        int(entry.name[5:]): entry for entry in entries if entry.name[5:].isdigit()
    }  # fmt: skip
    notes: list[str] = []
    for number in sorted((n for n in numbers if n < step), reverse=True):
        damage = find_damage(numbers[number])
        if damage is None:
            return numbers[number], notes
        notes.append(f"checkpoint {numbers[number]} is damaged and was skipped: {damage}")
    return None, notes


def _meta_of_start(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that a checkpoint of step 0 would have, from machine.json."""
    chosen = machine["chosen"]
    device = translated(machine["asked"])["device"]
    return {
        "versions": machine["versions"],
        "world_size": machine["world_size"],
        "context_parallel": device.get("context_parallel", 1),
        "tensor_parallel": device.get("tensor_parallel", 1),
        "threads": machine["threads"],
        "device": str(chosen["device"]).partition(":")[0],
        "kernels": chosen["kernels"],
        "compile": chosen["compile"],
        "deterministic": device["deterministic"],
        "micro_tokens": chosen["micro_tokens"],
    }


def _build(run: Path, machine: Mapping[str, Any], meta: Mapping[str, Any]) -> Job:
    """The run's job, with the micro-batch size that the run had."""
    change = Override(("device", "micro_tokens"), meta["micro_tokens"], "device.micro_tokens")
    recipe = read_recipe(run_files(run)["recipe"], [change])
    started = machine.get("folder")
    return build(for_one_process(recipe), folders=[run, *([Path(started)] if started else [])])


@contextmanager
def _threads(meta: Mapping[str, Any]) -> Iterator[None]:
    """Use the run's number of threads, since it decides the order of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(meta.get("threads") or before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _recorded(run: Path, step: int) -> dict[str, Any] | None:
    path = run_files(run)["metrics"]
    if not path.is_file():
        return None
    found = [r for r in read_records(path, kind="train") if r.get("step") == step]
    return {name: found[-1][name] for name in COMPARED} if found else None
