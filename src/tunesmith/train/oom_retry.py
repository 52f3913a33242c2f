"""Retry after an out-of-memory error with half as many tokens per micro-batch.

A failed attempt leaves nothing behind: its gradients are dropped and the random generators are set
back. So the next attempt is, to the bit, what a run with the smaller `micro_tokens` would have done
from there. By P3 it equals the undisturbed step within rounding. All ranks retry together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tunesmith.checkpoint.rng import RngState, capture_rng, restore_rng
from tunesmith.distributed.oom import CollectiveOOM, is_out_of_memory
from tunesmith.errors import RunError, first_line
from tunesmith.storage.atomic import read_json, write_json
from tunesmith.train.evaluate import GROUP_TOKENS, document_groups
from tunesmith.train.job import MicroBatching, Training
from tunesmith.train.microbatches import step_plans
from tunesmith.train.triggers import AbandonedError
from tunesmith.types import Document

HINT_FILE = "less-memory.json"
T = TypeVar("T")


class OOMRetry:
    """Runs the steps and evaluations of a run, again with smaller micro-batches where memory ran
    out. `cut` is how they are cut now; `requested` is the `micro_tokens` of the start.
    """

    def __init__(
        self, training: Training, cut: MicroBatching, folder: Path,
        emit: Callable[[Mapping[str, Any]], None],
    ) -> None:  # fmt: skip
        self.cut, self.requested = cut, cut.micro_tokens
        self._training, self._folder, self._emit = training, folder, emit

    def run(
        self, attempt: Callable[[], T], documents: Sequence[Document], where: str, step: int,
        *, grouped: bool = False,
    ) -> T:  # fmt: skip
        """The result of `attempt`. After each out-of-memory error `micro_tokens` is halved until
        the micro-batches of these documents become smaller, and `attempt` is called again.

        Several ranks retry where all of them know that one ran out of memory. Where only one knows,
        outside of micro-batches or where ranks do not check their peers, this is an error, and a
        file in the run's folder says what the next start should try. `grouped`: the documents are
        cut as in an evaluation.

        Raises:
            RunError: out of memory, and nothing smaller is left to try, or weights had already
                begun to change.
            AbandonedError: as the attempt did; everything is then as it was before it.
        """
        while True:
            state, steps = capture_rng(), self._training.optimizer.steps
            try:
                return attempt()
            except AbandonedError:
                _set_back(self._training, state)
                raise
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                changed = self._training.optimizer.steps != steps
                now, ranks = self._next(error, documents, changed=changed, grouped=grouped)
            # Out here the error is gone, and with it the tensors that its frames held.
            _set_back(self._training, state)
            before, self.cut = self.cut.micro_tokens, replace(self.cut, micro_tokens=now)
            self._emit(retry_record(where, step, before, now, ranks=ranks))

    def _next(
        self, error: Exception, documents: Sequence[Document], *, changed: bool, grouped: bool
    ) -> tuple[int, Sequence[int]]:
        """The `micro_tokens` of the next attempt, and the ranks on which memory ran out."""

        def largest(tokens: int) -> int:
            return _largest_microbatch(
                self._training, self.cut, documents, micro_tokens=tokens, grouped=grouped
            )

        world, micro_tokens = self._training.world, self.cut.micro_tokens
        now = smaller(micro_tokens, largest)
        ranks = error.ranks if isinstance(error, CollectiveOOM) else None
        if not (world.is_single or ranks is not None) and now is not None:
            write_hint(self._folder, asked=self.requested, now=now)
            raise out_of_memory_on(world.rank, micro_tokens, now) from error
        if now is None or changed:
            raise out_of_memory(micro_tokens, largest(micro_tokens), error) from error
        return now, ranks or ()


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


def _largest_microbatch(
    training: Training,
    cut: MicroBatching,
    documents: Sequence[Document],
    *,
    micro_tokens: int,
    grouped: bool,
) -> int:
    """Tokens of the largest micro-batch, as a step cuts the documents, or (`grouped`) an
    evaluation.
    """
    size = micro_tokens * training.world.cp.size * GROUP_TOKENS
    groups = [group for _, group in document_groups(documents, size)] if grouped else [documents]
    return max(
        plan.tokens
        for group in groups
        for plan in step_plans(
            group,
            training.world,
            work_model=cut.work,
            micro_tokens=micro_tokens,
            share_prefixes=cut.share_prefixes or grouped,
            unpacked=training.model.unpacked,
        )
    )


def saved_micro_tokens(meta: Mapping[str, Any], *, asked: int) -> int:
    """The `micro_tokens` to resume with: those of the checkpoint's `meta`, which retries may have
    lowered, unless another value is asked for now.
    """
    return int(meta["micro_tokens"]) if meta.get("micro_tokens_asked") == asked else asked


def write_hint(folder: Path, *, asked: int, now: int) -> None:
    """Note in a run's folder that a start with `asked` should go on with `now`, where the ranks
    can't do that themselves.
    """
    with suppress(RunError):  # a full disk must not hide what happened
        write_json(folder / HINT_FILE, {"asked": asked, "micro_tokens": now})


def read_hint(folder: Path, *, asked: int, micro_tokens: int) -> int:
    """The `micro_tokens` that `write_hint` left for a start with `asked`, if they are fewer."""
    hint = read_json(folder / HINT_FILE) if (folder / HINT_FILE).is_file() else None
    if hint is None or hint["asked"] != asked:
        return micro_tokens
    return min(micro_tokens, int(hint["micro_tokens"]))


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


def out_of_memory(micro_tokens: int, largest: int, error: Exception) -> RunError:
    """The error where nothing smaller is left to try, with what the allocator or library said."""
    return RunError(
        f"out of memory: a micro-batch of {largest} tokens does not fit with "
        f"device.micro_tokens={micro_tokens} ({first_line(error)})",
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


def _set_back(training: Training, state: RngState) -> None:
    training.optimizer.zero_grad()
    restore_rng(state)
    gc.collect()
    if training.device.type != "cpu":
        torch.accelerator.empty_cache()
