"""P2 and P3: packing, prefix sharing and micro-batching change neither loss nor gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tunesmith.build.job import Job
from tunesmith.build.objective import noisy_objective
from tunesmith.errors import TunesmithError
from tunesmith.objectives import nll
from tunesmith.train.loss import StepLoss
from tunesmith.types import Document
from tunesmith.verify.gradients import Learned, largest_difference, packed, plain
from tunesmith.verify.outcome import Outcome, judged
from tunesmith.verify.workload import tolerance_of

ALL_AT_ONCE = 10**9
"""`micro_tokens` that cut nothing."""
NOISE = 0.02
"""Of parameters that an adapter begins at zero, whose partners would have no gradient."""
ADVICE = (
    "train with device.attention=unpacked, which runs one path at a time, and report the model's "
    "architecture"
)


@dataclass(frozen=True, slots=True)
class Layouts:
    """The subject of these checks: a job at rest and a few of its documents."""

    job: Job
    documents: Sequence[Document]
    precision: str  # of the weights

    @property
    def tolerance(self) -> float:
        return tolerance_of(self.job)

    def counts(self, **more: int) -> dict[str, int]:
        """What every line counts."""
        return {
            "documents": len(self.documents),
            "tokens": sum(document.tokens for document in self.documents),
            "targets": sum(document.target_tokens for document in self.documents),
            "parameters": sum(
                p.numel() for p in self.job.training.model.parameters() if p.requires_grad
            ),
            **more,
        }  # fmt: skip


def layout_checks(subject: Layouts) -> list[Outcome]:
    """All lines of P2 and P3 that one process can check. The job's weights may be changed."""
    job = subject.job
    job.training.model.eval()  # dropout draws other numbers in another layout
    _wake_adapter(job)
    reference = plain(job.training.model, subject.documents)
    return [packed_alone(subject, reference), tree_flat(subject), micro_batches(subject)]


def packed_alone(subject: Layouts, reference: Learned) -> Outcome:
    """P2: all documents in one forward pass, nothing shared."""

    def run() -> Learned:
        return packed(
            subject.job, subject.documents, micro_tokens=ALL_AT_ONCE, share_prefixes=False
        )

    unpacked = subject.job.training.model.unpacked
    return _line(
        subject,
        reference,
        {"packed": run},
        promise="P2",
        name="packed = alone",
        compared="loss, each document's loss and every gradient of one packed pass",
        oracle="plain transformers, one path at a time, labels made by hand",
        note="this model runs one path at a time anyway" if unpacked else "",
    )


def tree_flat(subject: Layouts) -> Outcome:
    """P2: prefixes computed once; the first document is there twice, so that there is one."""
    job, compared = subject.job, "loss, each document's loss and every gradient, prefixes shared"
    repeated = replace(subject, documents=[*subject.documents, subject.documents[0]])
    oracle = "plain transformers, one path at a time, labels made by hand"
    if job.training.model.unpacked:
        return Outcome(
            promise="P2",
            name="tree = flat",
            compared=compared,
            oracle=oracle,
            counts={},
            verdict="not checked",
            note="this model runs one path at a time; nothing is shared",
        )

    def run() -> Learned:
        return packed(job, repeated.documents, micro_tokens=ALL_AT_ONCE, share_prefixes=True)

    return _line(
        repeated,
        plain(job.training.model, repeated.documents),
        {"shared": run},
        promise="P2",
        name="tree = flat",
        compared=compared,
        oracle=oracle,
    )


def micro_batches(subject: Layouts) -> Outcome:
    """P3: the recipe's own objective, micro-batches of any size, documents in any order."""
    job, documents = subject.job, subject.documents
    noisy = noisy_objective(job.choices.recipe)
    plain = StepLoss(objective=nll, steps=1, offload=job.training.loss.offload)
    loss = plain if noisy else job.training.loss
    whole = sum(document.tokens for document in documents)

    def step(micro_tokens: int, *, turned: bool = False) -> Callable[[], Learned]:
        def run() -> Learned:
            given = list(documents)[::-1] if turned else documents
            found = packed(
                job, given, micro_tokens=micro_tokens,
                share_prefixes=job.microbatching.share_prefixes, loss=loss,
            )  # fmt: skip
            return replace(found, document_loss=found.document_loss[::-1]) if turned else found

        return run

    alone = packed(job, documents, micro_tokens=1, share_prefixes=False, loss=loss)
    return _line(
        subject,
        alone,
        {
            "one pass": step(ALL_AT_ONCE),
            "half at a time": step(max(1, whole // 2)),
            "device.micro_tokens": step(job.microbatching.micro_tokens),
            "documents in reverse": step(max(1, whole // 3), turned=True),
        },
        promise="P3",
        name="any micro-batches",
        compared="loss, each document's loss and every gradient of four cuts of a step",
        oracle="the same step, one path a micro-batch",
        note="with nll: the recipe's objective draws random numbers" if noisy else "",
    )


def _line(
    subject: Layouts,
    reference: Learned,
    layouts: dict[str, Callable[[], Learned]],
    *,
    promise: str,
    name: str,
    compared: str,
    oracle: str,
    note: str = "",
) -> Outcome:
    worst, of, tokens = 0.0, "", 0
    for layout, run in layouts.items():
        try:
            found = run()
        except (RuntimeError, TypeError, ValueError, TunesmithError) as error:
            first = (str(error).splitlines() or [""])[0]
            worst, of = float("inf"), f"{layout} ended in {type(error).__name__}: {first[:100]}"
            break
        tokens = found.computed_tokens
        value, what = largest_difference(found, reference)
        if not value <= worst:
            worst, of = value, f"{what}, {layout}"
    verdict = judged(worst, subject.tolerance)
    parts = [part for part in (note, f"largest in {of}" if of else "") if part]
    return Outcome(
        promise=promise,
        name=name,
        compared=compared,
        oracle=oracle,
        counts=subject.counts(computed=tokens),
        verdict=verdict,
        difference=worst,
        tolerance=subject.tolerance,
        measure=f"relative, {subject.precision}",
        note="; ".join(parts),
        advice=ADVICE if verdict == "fails" else "",
    )


def _wake_adapter(job: Job) -> None:
    """Give trained parameters that are zero a value, or their partners' gradients would be zero
    and anything would agree.
    """
    generator = torch.Generator().manual_seed(0)
    if not hasattr(job.training.model.model, "peft_config"):
        return
    with torch.no_grad():
        for parameter in job.training.model.parameters():
            if parameter.requires_grad and not bool(parameter.any()):
                noise = torch.randn(parameter.shape, generator=generator) * NOISE
                parameter.copy_(noise.to(parameter.device, parameter.dtype))
