"""The loop: steps, evaluations, checkpoints and signals, in that order. What a step does is in
`step.py`.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.dump import science_dict
from tunesmith.config.values import Duration
from tunesmith.data.packing import MicrobatchPlan, plan_step
from tunesmith.data.store import longest_paths
from tunesmith.errors import InterruptedRun, NonFiniteError, RunError
from tunesmith.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from tunesmith.train.evaluate import evaluate
from tunesmith.train.incident import save_incident
from tunesmith.train.job import Job
from tunesmith.train.metrics import Sink, versions
from tunesmith.train.rng import capture_rng, restore_rng
from tunesmith.train.rows import RowLosses
from tunesmith.train.step import NonFiniteStep, StepResult, train_step
from tunesmith.types import Document, StepMetrics

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
        self.best: dict[str, float] | None = None  # {"step", "nll"} of the first held-out set
        self._saved: int | None = None
        self._due_since = {"checkpoint": time.monotonic(), "eval": time.monotonic()}

    def fit(self) -> None:
        """Run to the end, evaluating before the first and after the last step; the end is always a
        checkpoint.

        Raises:
            InterruptedRun: SIGINT or SIGTERM came; a checkpoint was saved.
            NonFiniteError: a loss or gradient became NaN or infinite.
            RunError: out of memory, or the disk is full.
        """
        self._try_longest()
        if self.step == 0:
            self._evaluate()
        with _signals() as received:
            while self.step < self.job.total_steps:
                self._one_step()
                last = self.step == self.job.total_steps
                if last or self._due("eval", self.job.recipe.eval.every):
                    self._evaluate()
                if last or received or self._due("checkpoint", self.job.recipe.checkpoint.every):
                    self.save()
                if received and not last:
                    self._stop(received[0])

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, to the bit where it was saved."""
        state = load_checkpoint(checkpoint)
        try:
            self.job.optimizer.load_state_dict(state.optimizer)
        except (KeyError, ValueError) as error:
            raise RunError(
                f"the checkpoint is of another model: {error}", where=str(checkpoint)
            ) from error
        self.rows.restore(state.model)
        self.job.loss.restore(state.model)
        self.best = state.meta.get("best")
        self.step = self._saved = state.step
        restore_rng(state.rng)

    def save(self) -> None:
        """Save a checkpoint of the current step, unless that was just done."""
        if self._saved == self.step:
            return
        best = int(self.best["step"]) if self.best else None
        state = TrainState(
            step=self.step,
            model={**self.rows.tensors(), **self.job.loss.tensors()},
            optimizer=self.job.optimizer.state_dict(),
            rng=capture_rng(),
            meta=self.meta(),
        )
        save_checkpoint(self.folder, state, keep=self.job.recipe.checkpoint.keep, best=best)
        self._saved = self.step
        self._emit({"kind": "event", "event": "checkpoint", "step": self.step})

    def meta(self) -> dict[str, Any]:
        """What a resume must find the same, and what it takes over."""
        return {
            "science": science_dict(self.job.recipe),
            "versions": versions(),
            "world_size": 1,
            "threads": torch.get_num_threads(),
            "device": str(self.job.device.type),
            "deterministic": self.job.recipe.device.deterministic,
            "micro_tokens": self.job.micro_tokens,
            "best": self.best,
        }

    def _one_step(self) -> None:
        job, number = self.job, self.step
        started = time.monotonic()
        indices = job.order.step_indices(number)
        lr = job.lr(number)
        documents, plans = self._planned(number)
        try:
            job.loss.begin(job.model, number, self._planned, job.device)
            result = train_step(
                job.model, job.optimizer, plans, job.loss,
                documents=len(documents), lr=lr,
                max_grad_norm=job.recipe.optim.max_grad_norm, device=job.device,
            )  # fmt: skip
        except NonFiniteError as error:
            if isinstance(error, NonFiniteStep):
                save_incident(self.folder, number + 1, documents=documents, result=error.result)
            names = ", ".join(str(document.origin) for document in documents[:3])
            raise NonFiniteError(
                f"{error.message}, at step {number + 1}; its documents begin with {names}",
                where=str(self.folder),
                hint="a lower optim.lr, or model.dtype=float32; "
                f"`tunesmith resume {self.folder}` goes on from the last checkpoint",
            ) from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _out_of_memory(job.micro_tokens) from error
        self.step = number + 1
        self.rows.add(self.step, indices, loss=result.document_loss, weight=result.document_weight)
        seconds = time.monotonic() - started
        self._emit(self._metrics(result, [d.tokens for d in documents], lr, seconds).record())

    def _planned(self, number: int) -> tuple[list[Document], list[MicrobatchPlan]]:
        """Documents and micro-batches of a step, counted from 0."""
        job = self.job
        documents = [job.documents[int(i)] for i in job.order.step_indices(number)]
        plans = plan_step(
            documents, micro_tokens=job.micro_tokens, share=job.share, isolated=job.model.isolated
        )
        return documents, plans

    def _metrics(
        self, result: StepResult, tokens: list[int], lr: float, seconds: float
    ) -> StepMetrics:
        return StepMetrics(
            step=self.step,
            epoch=round(self.job.order.epoch_after(self.step - 1), 6),
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
            peak_memory=_peak_memory(self.job.device),
        )

    def _evaluate(self) -> None:
        job = self.job
        for number, held_out in enumerate(job.eval_sets):
            started = time.monotonic()
            found = evaluate(
                job.model, held_out.documents, micro_tokens=job.micro_tokens, device=job.device
            )
            self._emit(
                {
                    "kind": "eval",
                    "step": self.step,
                    "epoch": round(job.order.epoch_after(self.step - 1), 6) if self.step else 0.0,
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
            )
            if number == 0 and (self.best is None or found.nll < self.best["nll"]):
                self.best = {"step": self.step, "nll": found.nll}
        if job.eval_sets and self.on_eval is not None:
            with _random_state_kept():
                self.on_eval(self.step)
        # Last, since a resume does not repeat the evaluation of the step it goes on from.
        if job.recipe.train.result == "best" and self.best and self.best["step"] == self.step:
            self.save()

    def _due(self, what: str, every: Duration | None) -> bool:
        if every is None:
            return False
        if every.unit == "steps":
            return self.step % int(every.value) == 0
        if every.unit == "minutes":
            due = time.monotonic() - self._due_since[what] >= 60 * every.value
            if due:
                self._due_since[what] = time.monotonic()
            return due
        before = self.job.order.epoch_after(self.step - 2) if self.step > 1 else 0.0
        # a hair is added since 0.1 + 0.2 must reach 0.3
        return math.floor(
            self.job.order.epoch_after(self.step - 1) / every.value + 1e-9
        ) > math.floor(before / every.value + 1e-9)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        self._emit({"kind": "event", "event": "interrupted", "signal": name, "step": self.step})
        raise InterruptedRun(
            f"stopped by {name} after step {self.step} of {self.job.total_steps}; it is saved",
            signal_number=number,
            hint=f"`tunesmith resume {self.folder}` goes on",
        )

    def _try_longest(self) -> None:
        """One pass over the longest document, thrown away: what does not fit fails now and not in
        an hour.
        """
        job = self.job
        longest = job.documents[int(longest_paths(job.documents).argmax())]
        plans = plan_step([longest], micro_tokens=job.micro_tokens, isolated=job.model.isolated)
        with _random_state_kept():
            try:
                for plan in plans[:1]:
                    job.loss.probe(job.model, longest, plan, job.device).loss_sum.backward()
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise _out_of_memory(job.micro_tokens, longest.longest_path) from error
        job.optimizer.zero_grad()

    def _emit(self, record: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)


@contextmanager
def _signals():
    """SIGINT and SIGTERM are noted, to stop after the step; a second one stops at once. Main thread
    only.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, a notebook server's for one
        old = {}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _random_state_kept():
    state = capture_rng()
    try:
        yield
    finally:
        restore_rng(state)


def _out_of_memory(micro_tokens: int, longest: int | None = None) -> RunError:
    what = f"the longest document, {longest} tokens," if longest else "a micro-batch"
    return RunError(
        f"out of memory: {what} does not fit with device.micro_tokens={micro_tokens}",
        hint=f"device.micro_tokens={max(256, micro_tokens // 2)}, "
        "device.gradient_checkpointing=true, a lower data.max_length, or adapter=lora",
    )


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
