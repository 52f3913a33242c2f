"""Load balancing over data-parallel ranks: equally many micro-batches each, and nearly equal work.

Longest-processing-time-first scheduling (Graham 1969), a round at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

Round = tuple[int, ...]
"""For each rank the index of its micro-batch, or `IDLE`."""

IDLE = -1
"""Marks a rank without a micro-batch in a round."""


def assign(work: Sequence[float], ranks: int) -> list[Round]:
    """Rounds with one micro-batch for every rank; each micro-batch is in exactly one round.

    Micro-batches are taken by descending work. Within a round the largest goes to the rank with the
    least work so far. So micro-batches that run at the same time are of similar size, and the loads
    of two ranks differ by at most the largest micro-batch: a round can't widen the gap between two
    ranks beyond the gap between two of its own items. Only the last round has idle ranks, and those
    have the most work already. Equal inputs give equal rounds on every rank.
    """
    if ranks < 1:
        raise ValueError("there is at least one rank")
    order = sorted(range(len(work)), key=lambda number: (-work[number], number))
    held = [0.0] * ranks
    rounds: list[Round] = []
    for first in range(0, len(order), ranks):
        indices = [IDLE] * ranks
        lightest = sorted(range(ranks), key=lambda rank: (held[rank], rank))
        for rank, number in zip(lightest, order[first : first + ranks], strict=False):
            indices[rank] = number
            held[rank] += work[number]
        rounds.append(tuple(indices))
    return rounds


def loads(rounds: Sequence[Round], work: Sequence[float]) -> list[float]:
    """The total work of each rank."""
    ranks = len(rounds[0]) if rounds else 0
    return [sum(work[r[rank]] for r in rounds if r[rank] != IDLE) for rank in range(ranks)]


def idle_fraction(rounds: Sequence[Round], work: Sequence[float]) -> float:
    """The fraction of all ranks' time spent waiting, if a round takes as long as its largest
    micro-batch.
    """
    if not rounds:
        return 0.0
    spans = [max(work[number] for number in r if number != IDLE) for r in rounds]
    whole = len(rounds[0]) * sum(spans)
    return 1.0 - sum(work) / whole if whole else 0.0
