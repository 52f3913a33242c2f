"""The training loop: steps, evaluations, checkpoints and signals, in that order.

What a step does is in `step.py`; the records it writes are made in `metrics/records.py`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tunesmith.checkpoint.manager import CheckpointManager, Progress, Stateful
from tunesmith.checkpoint.optimizer import SavedOptimizer
from tunesmith.checkpoint.rng import preserved_rng, seed_step
from tunesmith.checkpoint.writer_thread import WriterState
from tunesmith.data.microbatch.planner import MicrobatchPlan
from tunesmith.errors import InterruptedRun
from tunesmith.metrics.records import Sink, interrupted_record, peak_memory
from tunesmith.model.causal_lm import CausalLM
from tunesmith.train.anomaly.guard import Guard
from tunesmith.train.evaluations import Evaluations
from tunesmith.train.job import MicroBatching, RunData, TrainerOptions, Training
from tunesmith.train.microbatches import StepPlanner
from tunesmith.train.oom_retry import OOMRetry
from tunesmith.train.row_losses import RowLosses
from tunesmith.train.step import NonFiniteStep, StepResult, step_metrics, train_step
from tunesmith.train.triggers import AbandonedError, Schedule, SignalHandler, Trigger
from tunesmith.train.warm_up import longest_document, run_longest
from tunesmith.train.watchdog import Watchdog
from tunesmith.types import Document, LossOutput


class Trainer:
    """A run on its way from `step` to its last step."""

    def __init__(
        self,
        data: RunData,
        training: Training,
        microbatching: MicroBatching,
        options: TrainerOptions,
        *,
        folder: Path,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.data, self.training, self.options = data, training, options
        self.folder = folder
        self.sinks = sinks
        self.step = 0
        self.rows = RowLosses()
        self.oom_retry = OOMRetry(training, microbatching, folder, self._emit)
        world, sampler = training.world, data.sampler
        self._planner = StepPlanner(
            data.documents, sampler.step_indices, training.total_steps, world,
            unpacked=lambda: training.model.unpacked,
        )  # fmt: skip
        self.guard = Guard(
            folder, data.template.decode, non_finite=options.non_finite,
            limits=options.spike_limits, stops=options.stop_on_spike, world=world,
        )  # fmt: skip
        self.signals = SignalHandler(say=self._say_stopping)
        rank = None if world.is_single else world.rank
        self.watchdog = Watchdog(options.watchdog, folder, rank=rank)
        saved = SavedOptimizer(training.optimizer, training.grad_sync.sharded, world)
        self.checkpoints = CheckpointManager(saved, options.checkpoint, folder, self._emit)
        self.evaluations = Evaluations(
            data.eval_sets, training, self.oom_retry, self.watchdog,
            between=self._between, emit=self._emit,
        )  # fmt: skip
        self._schedule = Schedule(
            Trigger(options.eval_every, sampler.epoch_after),
            Trigger(options.save_every, sampler.epoch_after),
            world,
        )

    def fit(self) -> None:
        """Train to the last step, with an evaluation before the first and after the last step. The
        last step is always saved as a checkpoint.

        Raises:
            InterruptedRun: SIGINT, SIGTERM or SIGHUP came; a checkpoint was saved.
            NonFiniteError: a loss or gradient became NaN or infinite.
            RunError: out of memory, or the disk is full.
        """
        world = self.training.world
        with self.watchdog.watching(), world.naming_lost_rank(), self._writer_closed():
            self._try_longest()
            if self.step == 0 or self.evaluations.owed:
                self._evaluate()
            with self.signals.listening():
                while self.step < self.training.total_steps:
                    try:
                        self._advance()
                    except AbandonedError:
                        self._stop(self.signals.signal)
                self._wait_for_writer()

    def _advance(self) -> None:
        """One step, and then the evaluation, checkpoint or stop that is due after it."""
        self._one_step()
        last = self.step == self.training.total_steps
        # The same on every rank: all save together or none.
        writer = WriterState.DONE if self.checkpoints.pending is None else self.checkpoints.state
        due = self._schedule.after(self.step, signal=self.signals.signal, writer=writer)
        if self.checkpoints.pending is not None:
            self.checkpoints.poll(WriterState(due.writer))
        if last or due.evaluation:
            self._evaluate()
        if last or due.signal or due.checkpoint:
            self.save()
        if due.signal and not last:
            self._stop(due.signal)

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, to the bit."""
        at = self.checkpoints.restore(checkpoint, self._stateful)
        self.step, self.evaluations.best, self.evaluations.owed = at.step, at.best, at.owed

    def save(self) -> None:
        """Save a checkpoint of the current step, unless that was just done."""
        self.watchdog.beat(f"the checkpoint of step {self.step}")
        self.checkpoints.save(self._progress, self._stateful)

    def _wait_for_writer(self) -> None:
        self.watchdog.beat("the writing of a checkpoint")
        self.checkpoints.wait()

    @contextmanager
    def _writer_closed(self) -> Iterator[None]:
        """On leaving, no checkpoint is being written any more."""
        try:
            yield
        except BaseException as error:
            self.checkpoints.abort(error)
            raise
        finally:
            self.checkpoints.close()

    def meta(self) -> dict[str, Any]:
        """The meta data of a checkpoint: what a resume compares, and what it takes over."""
        return self.checkpoints.meta(self._progress)

    @property
    def _progress(self) -> Progress:
        found, retry = self.evaluations, self.oom_retry
        return Progress(self.step, found.best, found.owed, retry.cut.micro_tokens, retry.requested)

    @property
    def _stateful(self) -> tuple[Stateful, ...]:
        return self.rows, self.guard, self.training.loss

    def advance_to(self, step: int) -> None:
        """Run the steps up to this one with their records, without evaluations or checkpoints."""
        while self.step < step:
            self._one_step()

    def _one_step(self) -> None:
        number, started, world = self.step, time.monotonic(), self.training.world
        indices, lr = self.data.sampler.step_indices(number), self.training.lr(number)
        documents = self._planner.step(number, self.oom_retry.cut).documents
        self.watchdog.beat(f"step {number + 1}")
        if not world.is_single:
            seed_step(self.options.seed, number, world.rng_rank)
        try:
            result = self.oom_retry.run(
                lambda: self._learn(number, lr), documents, f"at step {number + 1}", number + 1
            )
        except NonFiniteStep as error:
            skipped = self.guard.not_finite(number + 1, documents, error.result)
            self.step = number + 1
            self._emit(skipped)
            return
        self.step = number + 1
        self.rows.add(self.step, indices, loss=result.document_loss, weight=result.document_weight)
        metrics = step_metrics(
            result, step=self.step, epoch=self._epoch(), lr=lr,
            tokens=[document.tokens for document in documents],
            seconds=time.monotonic() - started, peak_memory=peak_memory(self.training.device),
        )  # fmt: skip
        self._emit(metrics.record())
        if (spike := self.guard.look(self.step, documents, result)) is not None:
            self._emit(spike)
            self.guard.obey(spike)

    def _learn(self, number: int, lr: float) -> StepResult:
        training, cut = self.training, self.oom_retry.cut
        planned = self._planner.step(number, cut)
        return train_step(
            training.model, training.optimizer, planned.local, self._loss,
            begin=lambda: training.loss.begin(
                training.model, number, self.planned, training.device
            ),
            # the host is idle while the device computes: plan the next step then
            meanwhile=lambda: self._planner.prepare(number + 1, cut),
            documents=len(planned.documents), lr=lr, grad_sync=training.grad_sync,
            max_grad_norm=self.options.max_grad_norm, device=training.device,
        )  # fmt: skip

    def _loss(self, model: CausalLM, plan: MicrobatchPlan, device: torch.device) -> LossOutput:
        self._between()
        return self.training.loss(model, plan, device)

    def _between(self) -> None:
        """Before each micro-batch. Several ranks stop together, so only after a step."""
        self.watchdog.beat()
        if self.training.world.is_single:
            self.signals.check()

    def planned(self, number: int) -> tuple[list[Document], list[MicrobatchPlan]]:
        """Documents and micro-batches of a step, counted from 0, of all ranks."""
        planned = self._planner.step(number, self.oom_retry.cut)
        return planned.documents, planned.plans

    def _epoch(self) -> float:
        return round(self.data.sampler.epoch_after(self.step - 1), 6) if self.step else 0.0

    def _evaluate(self) -> None:
        repeated = self.evaluations.owed
        self.evaluations.run(self.step, self._epoch())
        if repeated:
            self.checkpoints.invalidate()
            self.save()
        # Last, since a resume does not repeat the evaluation of the step it continues from.
        if self.options.save_best and self.evaluations.best_is(self.step):
            self.save()

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        saved = "it is saved" if self.step else "there was nothing to save"
        if self.step:
            self.save()
            self._wait_for_writer()
        self._emit(interrupted_record(self.step, signal_name=name))
        raise InterruptedRun(
            f"stopped by {name} after step {self.step} of {self.training.total_steps}; {saved}",
            signal_number=number,
            hint=f"`tunesmith resume {self.folder}` goes on",
        )

    def _say_stopping(self, number: int) -> None:
        """Written past Python's streams: a signal's handler may interrupt a write to them."""
        if self.training.world.is_main:
            name, step = signal.Signals(number).name, self.step + 1
            text = f"\n{name}: finishing step {step}, then saving; again to abort\n"
            with suppress(OSError):
                os.write(2, text.encode())

    def _try_longest(self) -> None:
        """One discarded pass over the longest document: what does not fit fails now."""
        longest = longest_document(self.data.documents)
        with preserved_rng():
            self.oom_retry.run(
                lambda: run_longest(self.training, longest, self.oom_retry.cut.micro_tokens),
                [longest], "with the longest document", self.step,
            )  # fmt: skip
        self.training.optimizer.zero_grad()

    def _emit(self, record: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)
