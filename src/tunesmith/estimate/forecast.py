"""Forecast of a run's memory and time, from its recipe and a few real steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tunesmith.build.build import build
from tunesmith.build.context_parallel import context_line
from tunesmith.build.job import Job, saved_optimizer
from tunesmith.build.parallelize import for_one_process
from tunesmith.build.rank_utilization import idle_line
from tunesmith.build.summary import FEW_STEPS
from tunesmith.checkpoint.manager import COPY_FACTOR
from tunesmith.config.compatibility import Facts, check_together
from tunesmith.config.schema import Recipe
from tunesmith.config.values import Duration
from tunesmith.data.preprocess.document_store import longest_paths
from tunesmith.distributed.context_parallel import ContextParallel
from tunesmith.distributed.spawn import ranks_to_start
from tunesmith.distributed.world import World
from tunesmith.errors import RunError
from tunesmith.estimate.probe import Measured, probe
from tunesmith.estimate.workload import Work, count_work, training_flops
from tunesmith.model.memory.activations import activation_bytes
from tunesmith.model.memory.estimate import free_memory
from tunesmith.model.ops.activation_checkpointing import Mode
from tunesmith.model.ops.packed_weight import parameter_count


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run will take. Bytes, seconds, floating point operations."""

    parameters: int
    trained: int
    memory: dict[str, int]  # weights, gradients, optimizer, activations, head and working
    measured: Measured
    work: Work
    flops: float
    train_seconds: float
    eval_seconds: float
    free: int
    chosen: Mapping[str, Any]
    warnings: tuple[str, ...]
    would_fit: tuple[str, ...]  # changes to the recipe, where the run does not fit
    packing: dict[str, Any] | None = None  # packs, their fill and what was cut, if any are made
    context: tuple[str, ...] = ()  # how ranks share sequences; memory is then of one of them

    @property
    def fits(self) -> bool:
        """The measured peak is within what was free."""
        return self.measured.peak <= self.free

    @property
    def seconds(self) -> float:
        """Of all steps and evaluations; loading and writing come on top."""
        return self.train_seconds + self.eval_seconds

    def record(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {**asdict(self), "fits": self.fits, "seconds": self.seconds}


def forecast(recipe: Recipe, *, folders: Sequence[Path] = ()) -> Forecast:
    """Build the run, probe it and forget it; nothing is written but prepared data to the cache.

    Raises:
        InputError: what `train` would refuse too, a model that does not fit among it.
        RunError: a micro-batch does not fit; with recipe lines that need less.
    """
    ranks = ranks_to_start(recipe.device.kind, recipe.device.ranks)
    device = torch.device("cuda" if _on_cuda(recipe) else "cpu")
    free = free_memory(device)
    context = recipe.device.context_parallel
    together = context * recipe.device.tensor_parallel
    job = _one_of(recipe, ranks, folders)
    longest = int(longest_paths(job.data.documents).max())
    work = count_work(job)
    try:
        measured = probe(job, work)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(
            f"out of memory: a micro-batch of {work.largest} tokens does not fit",
            hint="device.gradient_checkpointing=layers, "
            f"device.micro_tokens={max(256, job.microbatching.micro_tokens // 2)}, or adapter=lora",
        ) from error
    finally:
        job.training.loss.close()
    memory = memory_parts(
        job, peak=measured.peak, activations=measured.activations, working=measured.working
    )
    if copied := copy_beside(job, peak=measured.peak, free=free):
        memory["checkpoint copy"] = copied
        measured = replace(measured, peak=measured.peak + copied)
    lines = () if measured.peak <= free else _would_fit(job, measured, memory, free)
    counts = [parameter_count(p) for p in job.training.model.parameters()]
    return Forecast(
        parameters=sum(counts),
        trained=sum(p.numel() for p in job.training.model.parameters() if p.requires_grad),
        memory=memory,
        measured=measured,
        work=work,
        flops=training_flops(job.training.model, tokens=work.computed, targets=work.target_tokens),
        train_seconds=measured.seconds_per_token * work.computed,
        eval_seconds=measured.eval_seconds_per_token * _eval_tokens(job, measured, work),
        free=free,
        chosen=job.choices.resolved,
        warnings=(
            *_warnings(work),
            *_whole_layers(recipe),
            *idle_line(job, max(1, ranks // together), together=together),
        ),
        would_fit=lines,
        packing=(job.data.prepared.ledger.plan or {}).get("packing"),
        context=tuple(context_line(context, max(ranks, context), longest=longest)),
    )


def _one_of(recipe: Recipe, ranks: int, folders: Sequence[Path]) -> Job:
    """The job in one process: where ranks are to share sequences, with the work of one of them.

    Raises:
        RecipeError: parts of the recipe that do not go together on so many ranks.
    """
    check_together(recipe, _planned_facts(recipe, ranks))
    played = World(cp=ContextParallel(recipe.device.context_parallel))
    return build(for_one_process(recipe), folders=folders, world=played)


def _planned_facts(recipe: Recipe, ranks: int) -> Facts:
    """The ranks that a plan is for: those of this machine, or of others where this one starts none.

    What only other machines can tell is taken as fitting: how many there are for `hybrid`, and
    that their device is no CPU.
    """
    device = recipe.device
    count, kind = ranks, "cuda" if _on_cuda(recipe) else "cpu"
    needed = device.context_parallel * device.tensor_parallel
    needed = max(needed, 1 if device.shard == "none" else 2)
    if ranks == 1 and needed > 1:
        count, kind = needed, "cpu" if device.kind == "cpu" else "cuda"
    machines = 2 if device.shard == "hybrid" else 1
    return Facts(machines * count, count, kind)


def copy_beside(job: Job, *, peak: int, free: int) -> int:
    """Bytes of the device's memory for the copy that a checkpoint is written from beside the next
    steps; 0 where none is made or it rests elsewhere.
    """
    asked = job.choices.recipe.checkpoint.background
    if asked is False or job.training.device.type != "cpu":
        return 0
    copied = saved_optimizer(job).local_bytes
    return copied if asked is True or peak + COPY_FACTOR * copied <= free else 0


def _on_cuda(recipe: Recipe) -> bool:
    return recipe.device.kind in ("auto", "cuda") and torch.cuda.is_available()


def memory_parts(job: Job, *, peak: int, activations: int, working: int) -> dict[str, int]:
    """Bytes that training holds, by what they are for; they add up to `peak`.

    What the peak has besides is the process itself, on a CPU, and freed memory that the allocator
    could not use again.
    """
    trained = [p for p in job.training.model.parameters() if p.requires_grad]
    parts = {
        "weights": tensor_bytes(job.training.model.parameters()),
        "gradients": 4 * sum(p.numel() for p in trained),
        "optimizer": job.training.optimizer.held_bytes,
        "activations": activations,
        "head and working memory": working,
    }
    if job.training.loss.reference is not None and job.training.loss.reference.frozen is not None:
        parts["base model"] = tensor_bytes(job.training.loss.reference.frozen.parameters())
    parts["process and allocator"] = max(0, peak - sum(parts.values()))
    return parts


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _eval_tokens(job: Job, measured: Measured, work: Work) -> int:
    tokens = sum(document.tokens for held in job.data.eval_sets for document in held.documents)
    steps_seconds = measured.seconds_per_token * work.computed
    return tokens * evaluations(
        job.choices.recipe.eval.every,
        steps=job.training.total_steps,
        epochs=job.data.sampler.epoch_after(job.training.total_steps - 1),
        seconds=steps_seconds,
    )


def evaluations(every: Duration | None, *, steps: int, epochs: float, seconds: float) -> int:
    """How often a run evaluates: before the first step, every so often, after the last."""
    if every is None:
        return 2
    whole = {"steps": float(steps), "minutes": seconds / 60}.get(every.unit, epochs)
    inside = int(whole / every.value + 1e-9)
    at_end = abs(whole / every.value - inside) < 1e-9  # the last step's is one of them
    return 1 + inside + (0 if at_end and inside else 1)


def _would_fit(job: Job, measured: Measured, memory: dict[str, int], free: int) -> tuple[str, ...]:
    """Changes to the recipe, one at a time, with which the peak would be within `free`."""
    dtype = next(job.training.model.base.parameters()).dtype
    now: Mode = job.choices.resolved["gradient_checkpointing"]
    usual = activation_bytes(job.training.model.config, dtype=dtype, checkpointing=now)
    lines: list[str] = []
    if measured.peak - memory.get("checkpoint copy", 0) <= free:
        lines.append("checkpoint.background=false")
    for mode in ("selective", "layers"):
        each = activation_bytes(job.training.model.config, dtype=dtype, checkpointing=mode)
        saved = measured.activations * (1 - each / usual)
        if saved > 0 and measured.peak - saved <= free:
            lines.append(f"device.gradient_checkpointing={mode}")
    # without the masters, which take 4 bytes each as the gradients do
    moments = job.training.optimizer.saved_bytes - memory["gradients"]
    if not job.choices.recipe.device.paged_optimizer and measured.peak - moments <= free:
        lines.append("device.paged_optimizer=true")
    half = (measured.activations + measured.working) / 2
    if job.microbatching.micro_tokens >= 512 and measured.peak - half <= free:
        lines.append(f"device.micro_tokens={job.microbatching.micro_tokens // 2}")
    state = memory["gradients"] + memory["optimizer"]
    adapter_share = 0.05  # of the state that an adapter needs of its own, at most
    saved_bytes = state * (1 - adapter_share)
    if job.choices.recipe.adapter.kind == "none" and measured.peak - saved_bytes <= free:
        lines.append("adapter=lora")
    return tuple(lines)


def _whole_layers(recipe: Recipe) -> list[str]:
    count = recipe.device.tensor_parallel
    if count == 1:
        return []
    return [
        "memory and time are of one process with whole layers; with "
        f"device.tensor_parallel={count} a rank has 1/{count} of each, and the whole embedding and "
        "head"
    ]


def _warnings(work: Work) -> tuple[str, ...]:
    if work.steps >= FEW_STEPS:
        return ()
    return (
        f"only {work.steps} optimizer steps: "
        "a smaller batch.documents or more train.epochs gives more",
    )
