"""Micro-batches dealt to ranks: as many to each, and nearly as much work."""

from __future__ import annotations

from collections.abc import Sequence

Round = tuple[int, ...]
"""For each rank the number of its micro-batch, or `IDLE`."""

IDLE = -1
"""A rank that has no micro-batch of its own in a round."""


def assign(work: Sequence[float], ranks: int) -> list[Round]:
    """Rounds in which every rank has one micro-batch, each micro-batch in one of them.

    Micro-batches go by falling work, a round at a time, the largest of a round to the rank that
    has least so far. So micro-batches that run at the same time are alike, and no two ranks differ
    by more than the largest micro-batch: a round can't widen the gap between two ranks beyond the
    gap between two of its own items. Only the last round has idle ranks, those with most work.
    Equal inputs give equal rounds on every rank.
    """
    if ranks < 1:
        raise ValueError("there is at least one rank")
    order = sorted(range(len(work)), key=lambda number: (-work[number], number))
    held = [0.0] * ranks
    rounds: list[Round] = []
    for first in range(0, len(order), ranks):
        dealt = [IDLE] * ranks
        lightest = sorted(range(ranks), key=lambda rank: (held[rank], rank))
        for rank, number in zip(lightest, order[first : first + ranks], strict=False):
            dealt[rank] = number
            held[rank] += work[number]
        rounds.append(tuple(dealt))
    return rounds


def loads(rounds: Sequence[Round], work: Sequence[float]) -> list[float]:
    """The work of each rank."""
    ranks = len(rounds[0]) if rounds else 0
    return [sum(work[r[rank]] for r in rounds if r[rank] != IDLE) for rank in range(ranks)]


def idle_fraction(rounds: Sequence[Round], work: Sequence[float]) -> float:
    """The share of all ranks' time in which they wait, if each round takes as long as its largest
    micro-batch.
    """
    if not rounds:
        return 0.0
    spans = [max(work[number] for number in r if number != IDLE) for r in rounds]
    whole = len(rounds[0]) * sum(spans)
    return 1.0 - sum(work) / whole if whole else 0.0
