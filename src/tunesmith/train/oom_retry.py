"""Work that is tried, and tried again with less at a time where memory runs out.

A try that fails leaves nothing: its gradients are dropped and the random generators are set back,
so that the next one is what a run with the smaller `micro_tokens` would have done from there, to
the bit. By P3 that is the undisturbed step within rounding. Several ranks try together and fail
together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from tunesmith.checkpoint.rng import RngState, capture_rng, restore_rng
from tunesmith.distributed.oom import CollectiveOOM, is_out_of_memory
from tunesmith.errors import RunError
from tunesmith.storage.atomic import read_json, write_json
from tunesmith.train.evaluate import GROUP_TOKENS, document_groups
from tunesmith.train.job import Job
from tunesmith.train.microbatches import step_plans
from tunesmith.train.signals import AbandonedError
from tunesmith.types import Document

HINT_FILE = "less-memory.json"
T = TypeVar("T")

Note = Callable[[int, int, Sequence[int]], None]
"""Told `micro_tokens` before and now, and on which of several ranks memory ran out."""


def retry_on_oom(
    attempt: Callable[[], T],
    job: Job,
    *,
    largest: Callable[[int], int],
    note: Note,
    leave: Callable[[int], None],
) -> T:
    """What `attempt` returns; each time it runs out of memory, `job.micro_tokens` is halved until
    micro-batches become smaller, `note` is told, and it is tried again.

    `largest` gives the tokens of the largest micro-batch at some `micro_tokens`, the same on every
    rank. Several ranks go back where all of them know that one ran out of memory. Where one finds
    out by itself, outside of micro-batches or where ranks don't ask each other, that is an error,
    and `leave` is told what the next start should try.

    Raises:
        RunError: out of memory, and nothing smaller is left to try, or weights had already begun
            to change.
        AbandonedError: as the attempt did; everything is then as it was before it.
    """
    while True:
        state, steps = capture_rng(), job.optimizer.steps
        try:
            return attempt()
        except AbandonedError:
            _set_back(job, state)
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            before = job.micro_tokens
            now = smaller(before, largest)
            ranks = error.ranks if isinstance(error, CollectiveOOM) else None
            known = job.world.is_single or ranks is not None
            if not known and now is not None:
                leave(now)
                raise out_of_memory_on(job.world.rank, before, now) from error
            if now is None or job.optimizer.steps != steps:
                raise out_of_memory(before, largest(before)) from error
        # Out here the error is gone, and with it the tensors that its frames held.
        _set_back(job, state)
        job.micro_tokens = now
        note(before, now, ranks or ())


def smaller(micro_tokens: int, largest: Callable[[int], int]) -> int | None:
    """The first of its halves at which the largest micro-batch has fewer tokens; None if there is
    none, since a micro-batch holds at least one path.
    """
    failed = largest(micro_tokens)
    while micro_tokens > 1:
        micro_tokens //= 2
        if largest(micro_tokens) < failed:
            return micro_tokens
    return None


def largest_microbatch(
    job: Job, documents: Sequence[Document], micro_tokens: int, *, grouped: bool
) -> int:
    """Tokens of the largest micro-batch as a step cuts the documents, or an evaluation."""
    size = micro_tokens * job.world.cp.size * GROUP_TOKENS
    groups = [group for _, group in document_groups(documents, size)] if grouped else [documents]
    return max(
        plan.tokens
        for group in groups
        for plan in step_plans(
            group,
            job.world,
            work_model=job.work,
            micro_tokens=micro_tokens,
            share_prefixes=job.share_prefixes or grouped,
            unpacked=job.model.unpacked,
        )
    )


def adopt_micro_tokens(job: Job, meta: Mapping[str, Any]) -> None:
    """Go on with the `micro_tokens` that a run had come down to, unless others are asked for now;
    `meta` is a checkpoint's.
    """
    if meta.get("micro_tokens_asked") == job.micro_tokens:
        job.micro_tokens = int(meta["micro_tokens"])


def write_hint(folder: Path, *, asked: int, now: int) -> None:
    """Note in a run's folder that a start with `asked` should go on with `now`, where the ranks
    can't do that themselves.
    """
    with suppress(RunError):  # a full disk must not hide what happened
        write_json(folder / HINT_FILE, {"asked": asked, "micro_tokens": now})


def read_hint(job: Job, folder: Path, *, asked: int) -> list[str]:
    """Go on with what ranks that ran out of memory have noted; says so."""
    word = read_json(folder / HINT_FILE) if (folder / HINT_FILE).is_file() else None
    if word is None or word["asked"] != asked or word["micro_tokens"] >= job.micro_tokens:
        return []
    job.micro_tokens = int(word["micro_tokens"])
    return [
        f"resume: memory ran out with device.micro_tokens={asked}; now it is {job.micro_tokens}"
    ]


def retry_record(
    where: str, step: int, before: int, now: int, *, ranks: Sequence[int] = ()
) -> dict[str, Any]:
    """The event of a retry, in metrics.jsonl and on the console; `ranks` are those of several on
    which it happened.
    """
    many = "s" if len(ranks) > 1 else ""
    place = f" on rank{many} {', '.join(map(str, ranks))}" if ranks else ""
    return {
        "kind": "event",
        "event": "out_of_memory",
        "step": step,
        "micro_tokens_before": before,
        "micro_tokens": now,
        **({"ranks": list(ranks)} if ranks else {}),
        "message": f"out of memory {where}{place} with micro_tokens {before}: done again with "
        f"{now}, which the run keeps",
    }


def out_of_memory(micro_tokens: int, largest: int) -> RunError:
    """The error where nothing smaller is left to try."""
    return RunError(
        f"out of memory: a micro-batch of {largest} tokens does not fit with "
        f"device.micro_tokens={micro_tokens}",
        hint=f"device.micro_tokens={max(256, micro_tokens // 2)}, "
        "device.gradient_checkpointing=true, a lower data.max_length, or adapter=lora",
    )


def out_of_memory_on(rank: int, micro_tokens: int, now: int) -> RunError:
    """The error of one of several ranks, where the others can't be told to go back."""
    return RunError(
        f"out of memory on rank {rank} with device.micro_tokens={micro_tokens}, where the other "
        "ranks can't go back with it",
        hint=f"`tunesmith resume RUN`, or torchrun's own restart, goes on with device.micro_tokens="
        f"{now}; or device.gradient_checkpointing=true, or a lower data.max_length",
    )


def _set_back(job: Job, state: RngState) -> None:
    job.optimizer.zero_grad()
    restore_rng(state)
    gc.collect()
    if job.device.type != "cpu":
        torch.accelerator.empty_cache()
