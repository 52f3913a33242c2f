"""The loop: steps, evaluations, checkpoints and signals, in that order. What a step does is in
`step.py`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from tunesmith.checkpoint.manager import CheckpointManager, Progress, Stateful
from tunesmith.checkpoint.rng import preserved_rng, seed_step
from tunesmith.checkpoint.writer_thread import WriterState
from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.data.preprocess.document_store import longest_paths
from tunesmith.errors import InterruptedRun
from tunesmith.metrics.records import Sink, peak_memory
from tunesmith.model.causal_lm import CausalLM
from tunesmith.train.anomaly.guard import Guard
from tunesmith.train.evaluate import evaluate
from tunesmith.train.job import EvalSet, Job
from tunesmith.train.microbatches import StepPlanner, local_part
from tunesmith.train.oom_retry import (
    largest_microbatch,
    retry_on_oom,
    retry_record,
    write_hint,
)
from tunesmith.train.row_losses import RowLosses
from tunesmith.train.signals import AbandonedError, SignalHandler
from tunesmith.train.step import NonFiniteStep, StepResult, train_step
from tunesmith.train.triggers import Trigger
from tunesmith.train.watchdog import Watchdog
from tunesmith.types import Document, LossOutput, StepMetrics

T = TypeVar("T")

OnEval = Callable[[int], None]
"""Called after each evaluation with the step."""


class Trainer:
    """A run on its way from `step` to the job's last step."""

    def __init__(
        self, job: Job, folder: Path, sinks: Sequence[Sink], *, on_eval: OnEval | None = None
    ) -> None:
        self.job = job
        self.folder = folder
        self.sinks = sinks
        self.on_eval = on_eval
        self.step = 0
        self.rows = RowLosses()
        self._planner = StepPlanner(job)
        log = job.recipe.log
        self.guard = Guard(
            folder, job.template.decode, non_finite=job.recipe.train.non_finite,
            limits={"loss": log.spike_loss, "grad_norm": log.spike_grad_norm},
            stops=log.on_spike == "stop", world=job.world,
        )  # fmt: skip
        self.best: dict[str, float] | None = None  # {"step", "nll"} of the first held-out set
        self.signals = SignalHandler()
        rank = None if job.world.is_single else job.world.rank
        self.watchdog = Watchdog(job.recipe.device.watchdog, folder, rank=rank)
        self.checkpoints = CheckpointManager(job, folder, self._emit)
        self._owed = False  # an evaluation of this step that was left in the middle
        self._eval_trigger = Trigger(job.recipe.eval.every, job.sampler.epoch_after)
        self._save_trigger = Trigger(job.recipe.checkpoint.every, job.sampler.epoch_after)

    def fit(self) -> None:
        """Run to the end, evaluating before the first and after the last step; the end is always a
        checkpoint.

        Raises:
            InterruptedRun: SIGINT or SIGTERM came; a checkpoint was saved.
            NonFiniteError: a loss or gradient became NaN or infinite.
            RunError: out of memory, or the disk is full.
        """
        with self.watchdog.watching(), self.job.world.naming_lost_rank(), self._writer_closed():
            self._try_longest()
            if self.step == 0 or self._owed:
                self._evaluate()
            with self.signals.listening():
                while self.step < self.job.total_steps:
                    try:
                        self._advance()
                    except AbandonedError:
                        self._stop(self.signals.signal)
                self._wait_for_writer()

    def _advance(self) -> None:
        """A step, and what is due after it."""
        self._one_step()
        last = self.step == self.job.total_steps
        evaluates, saves, stop, writing = self._agreed(self.signals.signal)
        self.checkpoints.poll(writing)
        if last or evaluates:
            self._evaluate()
        if last or stop or saves:
            self.save()
        if stop and not last:
            self._stop(stop)

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, to the bit where it was saved."""
        at = self.checkpoints.restore(checkpoint, self._stateful)
        self.step, self.best, self._owed = at.step, at.best, at.owed

    def save(self) -> None:
        """Save a checkpoint of the current step, unless that was just done."""
        self.watchdog.beat(f"the checkpoint of step {self.step}")
        self.checkpoints.save(self._progress, self._stateful)

    def _wait_for_writer(self) -> None:
        self.watchdog.beat("the writing of a checkpoint")
        self.checkpoints.wait()

    @contextmanager
    def _writer_closed(self) -> Iterator[None]:
        """Afterwards no checkpoint is being written any more."""
        try:
            yield
        except BaseException as error:
            self.checkpoints.abort(error)
            raise
        finally:
            self.checkpoints.close()

    def meta(self) -> dict[str, Any]:
        """What a resume must find the same, and what it takes over."""
        return self.checkpoints.meta(self._progress)

    @property
    def _progress(self) -> Progress:
        return Progress(self.step, self.best, self._owed)

    @property
    def _stateful(self) -> tuple[Stateful, ...]:
        return self.rows, self.guard, self.job.loss

    def advance_to(self, step: int) -> None:
        """The steps up to this one with their records; nothing is evaluated or saved."""
        while self.step < step:
            self._one_step()

    def _one_step(self) -> None:
        job, number = self.job, self.step
        started = time.monotonic()
        indices = job.sampler.step_indices(number)
        lr = job.lr(number)
        documents = [job.documents[int(i)] for i in indices]
        self.watchdog.beat(f"step {number + 1}")
        if not job.world.is_single:
            seed_step(job.recipe.train.seed, number, job.world.rng_rank)
        try:
            result = self._retry_on_oom(
                lambda: self._learn(number, lr), documents, f"at step {number + 1}", number + 1
            )
        except NonFiniteStep as error:
            skipped = self.guard.not_finite(number + 1, documents, error.result)
            self.step = number + 1
            self._emit(skipped)
            return
        self.step = number + 1
        self.rows.add(self.step, indices, loss=result.document_loss, weight=result.document_weight)
        seconds = time.monotonic() - started
        self._emit(self._metrics(result, [d.tokens for d in documents], lr, seconds).record())
        if (spike := self.guard.look(self.step, documents, result)) is not None:
            self._emit(spike)
            self.guard.obey(spike)

    def _learn(self, number: int, lr: float) -> StepResult:
        job = self.job
        planned = self._planner.step(number)
        return train_step(
            job.model, job.optimizer, planned.local, self._loss,
            begin=lambda: job.loss.begin(job.model, number, self.planned, job.device),
            meanwhile=lambda: self._planner.prepare(number + 1),
            documents=len(planned.documents), lr=lr, grad_sync=job.grad_sync,
            max_grad_norm=job.recipe.optim.max_grad_norm, device=job.device,
        )  # fmt: skip

    def _loss(self, model: CausalLM, plan: MicrobatchPlan, device: torch.device) -> LossOutput:
        self._between()
        return self.job.loss(model, plan, device)

    def _between(self) -> None:
        """Before each micro-batch. Several ranks stop together, after a step."""
        self.watchdog.beat()
        if self.job.world.is_single:
            self.signals.check()

    def _retry_on_oom(
        self, attempt: Callable[[], T], documents: Sequence[Document], where: str, step: int,
        *, grouped: bool = False,
    ) -> T:  # fmt: skip
        job = self.job
        return retry_on_oom(
            attempt,
            job,
            largest=lambda tokens: largest_microbatch(job, documents, tokens, grouped=grouped),
            note=lambda before, now, ranks: self._emit(
                retry_record(where, step, before, now, ranks=ranks)
            ),
            leave=lambda now: write_hint(
                self.folder, asked=self.meta()["micro_tokens_asked"], now=now
            ),
        )

    def planned(self, number: int) -> tuple[list[Document], list[MicrobatchPlan]]:
        """Documents and micro-batches of a step, counted from 0, for all ranks."""
        planned = self._planner.step(number)
        return planned.documents, planned.plans

    def _agreed(self, received: int) -> tuple[bool, bool, int, WriterState]:
        """Whether an evaluation and a checkpoint are due by the first rank's clock, the signal that
        came to any rank, 0 for none, and how far all ranks are with a checkpoint.
        """
        first = self.job.world.is_main
        own = [
            first and self._eval_trigger.due(self.step),
            first and self._save_trigger.due(self.step),
            received,
            self.checkpoints.state,
        ]
        evaluates, saves, stop, writing = self.job.world.all_reduce_max(own)
        return bool(evaluates), bool(saves), int(stop), WriterState(int(writing))

    def _metrics(
        self, result: StepResult, tokens: list[int], lr: float, seconds: float
    ) -> StepMetrics:
        return StepMetrics(
            step=self.step,
            epoch=round(self.job.sampler.epoch_after(self.step - 1), 6),
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            documents=len(tokens),
            tokens=sum(tokens),
            computed_tokens=result.computed_tokens,
            target_tokens=result.target_tokens,
            weight_sum=result.weight_sum,
            seconds=seconds,
            tokens_per_second=sum(tokens) / seconds,
            stats=result.stats,
            peak_memory=peak_memory(self.job.device),
        )

    def _evaluate(self) -> None:
        job = self.job
        again, self._owed = self._owed, True
        records = [self._evaluated(held_out) for held_out in job.eval_sets]
        for record in records:
            self._emit(record)
        if records and (self.best is None or records[0]["nll"] < self.best["nll"]):
            self.best = {"step": self.step, "nll": records[0]["nll"]}
        if job.eval_sets and self.on_eval is not None:
            self.watchdog.beat(f"the samples after step {self.step}")
            with preserved_rng():
                self.on_eval(self.step)
        self._owed = False
        if again:
            self.checkpoints.invalidate()
            self.save()
        # Last, since a resume does not repeat the evaluation of the step it goes on from.
        if job.recipe.train.result == "best" and self.best and self.best["step"] == self.step:
            self.save()

    def _evaluated(self, held_out: EvalSet) -> dict[str, Any]:
        """The record of a held-out set at this step."""
        job = self.job
        started = time.monotonic()
        self.watchdog.beat(f"the evaluation after step {self.step}")
        found = self._retry_on_oom(
            lambda: evaluate(
                job.model, held_out.documents, micro_tokens=job.micro_tokens, device=job.device,
                world=job.world, work_model=job.work, before_each=self._between,
                together=job.grad_sync.all_ranks_or_none,
            ),
            held_out.documents, f"in the evaluation after step {self.step}", self.step,
            grouped=True,
        )  # fmt: skip
        return {
            "kind": "eval",
            "step": self.step,
            "epoch": round(job.sampler.epoch_after(self.step - 1), 6) if self.step else 0.0,
            "set": held_out.name,
            "content_hash": held_out.content_hash,
            "rows": found.documents,
            "target_tokens": found.target_tokens,
            "nll": found.nll,
            "perplexity": found.perplexity,
            "accuracy": found.accuracy,
            "entropy": found.entropy,
            "seconds": time.monotonic() - started,
        }

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        saved = "it is saved" if self.step else "there was nothing to save"
        if self.step:
            self.save()
            self._wait_for_writer()
        self._emit({"kind": "event", "event": "interrupted", "signal": name, "step": self.step})
        raise InterruptedRun(
            f"stopped by {name} after step {self.step} of {self.job.total_steps}; {saved}",
            signal_number=number,
            hint=f"`tunesmith resume {self.folder}` goes on",
        )

    def _try_longest(self) -> None:
        """One pass over the longest document, thrown away: what does not fit fails now and not in
        an hour.
        """
        job = self.job
        longest = job.documents[int(longest_paths(job.documents).argmax())]

        def attempt() -> None:
            plans = plan_step([longest], micro_tokens=job.micro_tokens, unpacked=job.model.unpacked)
            with job.grad_sync.all_ranks_or_none():
                for plan in plans[:1]:
                    plan = local_part(plan, job.world.model_parallel)
                    job.loss.probe(job.model, longest, plan, job.device).loss_sum.backward()

        with preserved_rng():
            self._retry_on_oom(attempt, [longest], "with the longest document", self.step)
        job.optimizer.zero_grad()

    def _emit(self, record: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)
