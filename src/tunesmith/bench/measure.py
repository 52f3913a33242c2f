"""Benchmark of a run: a few real steps are timed and compared with the floor."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.bench.breakdown import breakdown
from tunesmith.bench.floor import MatmulRate, matmul_rate, product_dtype, product_shapes
from tunesmith.build.build import build
from tunesmith.build.job import Job
from tunesmith.build.parallelize import for_one_process
from tunesmith.config.schema import Recipe
from tunesmith.distributed.oom import is_out_of_memory
from tunesmith.estimate.forecast import memory_parts
from tunesmith.estimate.probe import activation_bytes_of, run_longest_of, run_step
from tunesmith.estimate.workload import (
    Work,
    count_work,
    documents_of,
    evenly_spaced,
    planned,
    training_flops,
)
from tunesmith.metrics.records import peak_memory
from tunesmith.model.ops.packed_weight import parameter_count
from tunesmith.train.oom_retry import out_of_memory

STEPS = 5


@dataclass(frozen=True, slots=True)
class StepTime:
    """One timed step."""

    step: int  # counted from 0
    seconds: float
    tokens: int  # of its documents, repeats counted
    computed: int  # that went through the decoder
    flops: float  # that had to be done


@dataclass(frozen=True, slots=True)
class Bench:
    """What was seen. Bytes, seconds, floating point operations."""

    device: str
    threads: int
    dtype: str
    parameters: int
    trained: int
    steps: tuple[StepTime, ...]
    rate: MatmulRate
    memory: dict[str, int]  # by part
    peak: int
    parts: dict[str, float]  # seconds of a step by where they went, under the profiler
    work: Work  # of the whole run
    chosen: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Of all timed steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the documents, repeats counted, over the time of their steps."""
        return sum(step.tokens for step in self.steps) / self.seconds

    @property
    def floor_seconds(self) -> float:
        """What the timed steps would take if nothing but their products with weights took time."""
        return sum(step.flops for step in self.steps) / self.rate.flops_per_second

    @property
    def floor_share(self) -> float:
        """1 if the timed steps took no longer than their floor."""
        return self.floor_seconds / self.seconds

    @property
    def padding_avoided(self) -> int:
        """Tokens of padding, if each path of a step were a row as long as its longest; whole
        run.
        """
        return self.work.padded - self.work.unshared

    @property
    def repeats_avoided(self) -> int:
        """Tokens that sharing prefixes and leaving out last targets saves; whole run."""
        return self.work.unshared - self.work.computed

    def record(self) -> dict[str, Any]:
        """Everything as plain values."""
        derived = (
            "seconds", "tokens_per_second", "floor_seconds", "floor_share", "padding_avoided",
            "repeats_avoided",
        )  # fmt: skip
        each = [step.seconds for step in self.steps]
        return {
            **asdict(self),
            **{name: getattr(self, name) for name in derived},
            "median_step_seconds": statistics.median(each),
        }


def bench(recipe: Recipe, *, folders: Sequence[Path] = (), steps: int = STEPS) -> Bench:
    """Build the run, time `steps` of its steps and forget it. Nothing is written but prepared data
    to the cache.

    Raises:
        InputError: what `train` would refuse too.
        RunError: a micro-batch does not fit.
    """
    job = build(for_one_process(recipe), folders=folders)
    work = count_work(job)
    try:
        return _measured(job, work, steps)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(job.microbatching.micro_tokens, work.largest, error) from error
    finally:
        job.training.loss.close()


def _measured(job: Job, work: Work, steps: int) -> Bench:
    shapes = product_shapes(job.training.model, work.largest)
    dtype = product_dtype(job.training.model)
    before = matmul_rate(shapes, dtype=dtype, device=job.training.device)
    run_longest_of(job)  # as a run begins
    run_step(job, work.largest_step)
    timed = tuple(_timed(job, step) for step in evenly_spaced(job.training.total_steps, steps))
    after = matmul_rate(shapes, dtype=dtype, device=job.training.device)
    peak = peak_memory(job.training.device)
    parts = breakdown(job, timed[-1].step)
    activations, working = activation_bytes_of(job, work)
    parameters = list(job.training.model.parameters())
    return Bench(
        device=str(job.training.device),
        threads=torch.get_num_threads(),
        dtype=str(job.training.model.head.weight.dtype).removeprefix("torch."),
        parameters=sum(parameter_count(p) for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        steps=timed,
        rate=max(before, after, key=lambda rate: rate.flops_per_second),
        memory=memory_parts(job, peak=peak, activations=activations, working=working),
        peak=peak,
        parts=parts,
        work=work,
        chosen=job.choices.resolved,
    )


def _timed(job: Job, step: int) -> StepTime:
    seconds, computed = run_step(job, step)
    targets = sum(len(plan.target) for plan in planned(job, step))
    tokens = sum(document.tokens for document in documents_of(job, step))
    flops = training_flops(job.training.model, tokens=computed, targets=targets)
    return StepTime(step, seconds, tokens, computed, flops)
