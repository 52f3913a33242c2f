"""The evaluations of a run on its held-out sets, the best of them, and the samples after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.checkpoint.rng import preserved_rng
from tunesmith.metrics.records import eval_record
from tunesmith.train.evaluate import evaluate
from tunesmith.train.job import EvalSet, Training
from tunesmith.train.oom_retry import OOMRetry
from tunesmith.train.watchdog import Watchdog

OnEval = Callable[[int], None]
"""Called after each evaluation with the step."""


class Evaluations:
    """Evaluates the model on every held-out set of the run.

    `between` is called before each micro-batch; `emit` writes a record.
    """

    def __init__(
        self, sets: Sequence[EvalSet], training: Training, retry: OOMRetry, watchdog: Watchdog,
        *, between: Callable[[], None], emit: Callable[[Mapping[str, Any]], None],
    ) -> None:  # fmt: skip
        self.on_eval: OnEval | None = None
        self.best: dict[str, float] | None = None  # {"step", "nll"} of the first held-out set
        self.owed = False  # the evaluation of this step was interrupted
        self._sets, self._training, self._retry = sets, training, retry
        self._watchdog, self._between, self._emit = watchdog, between, emit

    def run(self, step: int, epoch: float) -> None:
        """Evaluate all sets after this step. The records are written once all are done."""
        self.owed = True
        records = [self._evaluated(held_out, step, epoch) for held_out in self._sets]
        for record in records:
            self._emit(record)
        if records and (self.best is None or records[0]["nll"] < self.best["nll"]):
            self.best = {"step": step, "nll": records[0]["nll"]}
        if records and self.on_eval is not None:
            self._watchdog.beat(f"the samples after step {step}")
            with preserved_rng():
                self.on_eval(step)
        self.owed = False

    def best_is(self, step: int) -> bool:
        """Whether the evaluation after this step is the best so far."""
        return self.best is not None and self.best["step"] == step

    def _evaluated(self, held_out: EvalSet, step: int, epoch: float) -> dict[str, Any]:
        """The record of a held-out set at this step."""
        training, started = self._training, time.monotonic()
        where = f"the evaluation after step {step}"
        self._watchdog.beat(where)
        found = self._retry.run(
            lambda: evaluate(
                training.model, held_out.documents, micro_tokens=self._retry.cut.micro_tokens,
                device=training.device, world=training.world, work_model=self._retry.cut.work,
                before_each=self._between, together=training.grad_sync.all_ranks_or_none,
            ),
            held_out.documents, f"in {where}", step, grouped=True,
        )  # fmt: skip
        return eval_record(
            found, step=step, epoch=epoch, name=held_out.name,
            content_hash=held_out.content_hash, seconds=time.monotonic() - started,
        )  # fmt: skip
