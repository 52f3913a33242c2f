"""A few real steps of a run, timed and measured. The model is changed by them and must not be used
afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tunesmith.build.job import Job
from tunesmith.data.microbatch.planner import MicrobatchPlan
from tunesmith.estimate.workload import Work, documents_of, evenly_spaced, planned
from tunesmith.metrics.records import peak_memory
from tunesmith.model.memory.allocator import footprint
from tunesmith.train.evaluate import evaluate
from tunesmith.train.microbatches import collate, local_part
from tunesmith.train.step import StepResult, train_step
from tunesmith.train.warm_up import longest_document, run_longest

TIMED_STEPS, SECONDS, EVAL_DOCUMENTS = 4, 60.0, 16


@dataclass(frozen=True, slots=True)
class Measured:
    """What the probe saw. Bytes and seconds."""

    peak: int  # of the device's allocator, on a CPU of the process
    activations: int  # held for the backward pass of the largest micro-batch
    working: int  # what came on top in its head and backward pass
    seconds_per_token: float  # of a step, optimizer included, over its computed tokens
    eval_seconds_per_token: float  # 0 without held-out data
    steps: int  # timed


def probe(job: Job, work: Work) -> Measured:
    """Begin as the run does, then time some steps, then run the one with the largest micro-batch.

    How much of freed memory an allocator can use again depends on the order in which sizes are
    asked for: on a CPU the peak of a run that began with its largest micro-batch was a fifth above
    that of the same run in its own order.
    """
    run_longest_of(job)
    begun = peak_memory(job.training.device)
    seconds = tokens = timed = 0
    started = time.monotonic()
    ran: list[int] = []
    for step in evenly_spaced(job.training.total_steps, TIMED_STEPS + 1):
        took, computed = run_step(job, step)
        ran.append(step)
        if len(ran) == 1 and job.training.total_steps > TIMED_STEPS:
            continue  # to warm up; a run so short that all of it is timed takes this too
        seconds, tokens, timed = seconds + took, tokens + computed, timed + 1
        if time.monotonic() - started > SECONDS:
            break
    if work.largest_step not in ran:
        run_step(job, work.largest_step)
    per_eval = _time_evaluation(job)
    # pages that the system could write out are counted as the process's own
    paged = job.training.optimizer.paged_bytes if job.training.device.type == "cpu" else 0
    peak = max(begun, peak_memory(job.training.device) - paged)
    activations, working = activation_bytes_of(job, work)
    return Measured(peak, activations, working, seconds / tokens, per_eval, timed)


def run_longest_of(job: Job) -> None:
    """The discarded pass with which a run begins."""
    run_longest(
        job.training,
        longest_document(job.data.documents),
        job.microbatching.micro_tokens,
        part=lambda plan: local_parts(job, [plan])[0],
    )
    job.training.optimizer.zero_grad()


def local_parts(job: Job, plans: Sequence[MicrobatchPlan]) -> list[MicrobatchPlan]:
    """What one rank has of the micro-batches, where ranks are to share them: the one of each with
    most targets.
    """
    context = job.training.world.cp
    return [
        max(
            (local_part(plan, replace(context, rank=place)) for place in range(context.size)),
            key=lambda part: len(part.source),
        )
        for plan in plans
    ]


def run_step(job: Job, step: int) -> tuple[float, int]:
    """Seconds and computed tokens of a step."""
    started = time.monotonic()
    result = take_step(job, step)
    return time.monotonic() - started, result.computed_tokens


def take_step(job: Job, step: int, *, lr: float = 0.0) -> StepResult:
    """A step of the run by itself; the usual `lr` leaves the weights as they are."""
    plans = planned(job, step)
    job.training.loss.begin(
        job.training.model,
        step,
        lambda n: (documents_of(job, n), planned(job, n)),
        job.training.device,
    )
    return train_step(
        job.training.model, job.training.optimizer, local_parts(job, plans), job.training.loss,
        documents=len(documents_of(job, step)), lr=lr,
        max_grad_norm=job.choices.recipe.optim.max_grad_norm, device=job.training.device,
    )  # fmt: skip


def _time_evaluation(job: Job) -> float:
    if not job.data.eval_sets:
        return 0.0
    documents = [job.data.eval_sets[0].documents[n] for n in range(
        min(EVAL_DOCUMENTS, len(job.data.eval_sets[0].documents))
    )]  # fmt: skip
    started = time.monotonic()
    evaluate(
        job.training.model,
        documents,
        micro_tokens=job.microbatching.micro_tokens,
        device=job.training.device,
        world=job.training.world,
    )
    tokens = sum(document.tokens for document in documents) / job.training.world.cp.size
    return (time.monotonic() - started) / tokens


def activation_bytes_of(job: Job, work: Work) -> tuple[int, int]:
    """Bytes held after the largest micro-batch's decoder, and the most above them until its
    gradients are there.
    """
    whole = max(planned(job, work.largest_step), key=lambda plan: plan.tokens)
    (plan,) = local_parts(job, [whole])
    batch = collate(plan, job.training.device)
    with footprint(job.training.device) as forward:
        hidden = job.training.model.hidden(batch, offload=job.training.loss.offload)
    del hidden
    job.training.loss(
        job.training.model, plan, job.training.device
    ).loss_sum.backward()  # the gradients are there from here
    with footprint(job.training.device) as whole:
        job.training.loss(job.training.model, plan, job.training.device).loss_sum.backward()
    job.training.optimizer.zero_grad()
    return forward.held, max(0, whole.peak - forward.held)
