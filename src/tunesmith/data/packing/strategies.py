"""Bin packing of lengths as pure functions: best-fit decreasing (arXiv 2404.10830), split, wrapped.

Documents of one length are interchangeable, so the work is done per length and not per document: a
group of packs with the same free space takes as many documents of a length as fit at once. The time
is that of sorting the lengths, plus a step for each distinct length and each distinct free space.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Packs:
    """Packed items: pack k holds `items[bounds[k]:bounds[k + 1]]`, in that order."""

    items: Numbers  # [n] every item once
    bounds: Numbers  # [packs + 1]
    tokens: Numbers  # [packs]
    capacity: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fill(self) -> float:
        """The fraction of the packs' capacity that is filled with tokens."""
        return float(self.tokens.sum()) / max(1, len(self) * self.capacity)

    def pack(self, number: int) -> Numbers:
        """The items of a pack."""
        return self.items[self.bounds[number] : self.bounds[number + 1]]


@dataclass(frozen=True, slots=True)
class Spans:
    """Pieces [start, end) of items, in the order of the items."""

    item: Numbers
    start: Numbers
    end: Numbers

    @property
    def lengths(self) -> Numbers:
        """Tokens of each piece."""
        return self.end - self.start


def best_fit(lengths: ArrayLike, capacity: int) -> Packs:
    """Best-fit decreasing: longest item first, each into the fullest pack that still has room for
    it.

    Among packs with the same free space the one that has had it longest is taken, among items of
    one length the first.

    Raises:
        ValueError: a length is not from 1 to `capacity`.
    """
    sizes = _checked(lengths, capacity)
    order = _longest_first(sizes, capacity)
    shelf = _Shelf(capacity)
    pack_of = np.empty(len(sizes), np.int64)
    counts = np.bincount(sizes) if len(sizes) else np.zeros(1, np.int64)
    at = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[length])
        shelf.place(length, pack_of[at : at + count])
        at += count
    return _gathered(order, pack_of, sizes, shelf.packs, capacity)


class _Shelf:
    """Packs by free space; for each free space in the order in which packs came to have it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.packs = 0
        self._rooms: list[int] = []  # ascending, without full packs and without new ones
        self._with: dict[int, deque[Numbers]] = {}

    def place(self, length: int, pack_of: Numbers) -> None:
        """Assign a pack to each of len(pack_of) items of one length, into `pack_of`.

        A pack that has taken one item has less free space than any other candidate, so best fit
        fills it with items of this length before it takes the next pack.
        """
        done, count = 0, len(pack_of)
        while done < count:
            at = bisect_left(self._rooms, length)
            # No open pack has room: open as many new ones as the items need.
            if at == len(self._rooms):
                room = self.capacity
                needed = -(-(count - done) // (room // length))
                packs = np.arange(self.packs, self.packs + needed)
                self.packs += needed
            else:
                room = self._rooms[at]
                packs = self._take(at, -(-(count - done) // (room // length)))
            each = room // length
            taken = min(count - done, each * len(packs))
            pack_of[done : done + taken] = np.repeat(packs, each)[:taken]
            done += taken
            full, rest = divmod(taken, each)
            self._put(room - each * length, packs[:full])
            if rest:
                self._put(room - rest * length, packs[full:])

    def _take(self, at: int, most: int) -> Numbers:
        """At most `most` packs of one free space: the first group of them, or a part of it."""
        groups = self._with[self._rooms[at]]
        group = groups.popleft()
        if len(group) > most:
            groups.appendleft(group[most:])
        if not groups:
            del self._with[self._rooms.pop(at)]
        return group[:most]

    def _put(self, room: int, packs: Numbers) -> None:
        if not room or not len(packs):
            return
        if room not in self._with:
            self._with[room] = deque()
            insort(self._rooms, room)
        self._with[room].append(packs)


def split(lengths: ArrayLike, capacity: int) -> Spans:
    """Split items into pieces of `capacity` tokens; the last piece of each is what is left."""
    sizes = np.asarray(lengths, np.int64)
    pieces = -(-sizes // capacity)
    item = np.repeat(np.arange(len(sizes)), pieces)
    first = np.cumsum(pieces) - pieces
    start = (np.arange(len(item)) - first[item]) * capacity
    return Spans(item, start, np.minimum(start + capacity, sizes[item]))


def wrap(lengths: ArrayLike, capacity: int) -> tuple[Spans, Packs]:
    """Concatenate all items and cut after every `capacity` tokens; the last pack may be shorter."""
    sizes = np.asarray(lengths, np.int64)
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    # A span ends where an item ends and where a pack ends.
    edges = np.union1d(ends[sizes > 0], np.append(np.arange(capacity, total, capacity), total))
    edges = edges[edges > 0]
    starts = np.concatenate([np.zeros(min(1, len(edges)), np.int64), edges[:-1]])
    item = np.searchsorted(ends, starts, side="right")
    before = (ends - sizes)[item]
    spans = Spans(item, starts - before, edges - before)
    packs = -(-total // capacity)
    bounds = np.searchsorted(starts, np.arange(packs + 1) * capacity, side="left")
    tokens = np.diff(np.minimum(np.arange(packs + 1) * capacity, total))
    return spans, Packs(np.arange(len(item)), bounds, tokens, capacity)


def _checked(lengths: ArrayLike, capacity: int) -> Numbers:
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and not (int(sizes.min()) >= 1 and int(sizes.max()) <= capacity):
        raise ValueError(
            f"lengths from 1 to {capacity} are packed, not {sizes.min()} to {sizes.max()}"
        )
    return sizes


def _longest_first(sizes: Numbers, capacity: int) -> Numbers:
    """The order of items, longest first; a stable sort, so ties keep their order."""
    # numpy sorts 16-bit integers by radix sort, in linear time.
    kind = np.uint16 if capacity < 2**16 else np.int64
    return np.argsort((capacity - sizes).astype(kind), kind="stable")


def _gathered(order: Numbers, pack_of: Numbers, sizes: Numbers, packs: int, capacity: int) -> Packs:
    """The packs, from the pack of each item in the order in which items were placed."""
    kind = np.uint16 if packs < 2**16 else np.int64
    items = order[np.argsort(pack_of.astype(kind), kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(pack_of, minlength=packs))])
    reached = np.concatenate([[0], np.cumsum(sizes[items])])
    return Packs(items, bounds, np.diff(reached[bounds]), capacity)
