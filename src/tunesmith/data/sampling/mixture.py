"""Mixtures of data sources by weight: the source and the document of every place in closed form,
without state.

Places are dealt down a Huffman tree of the weights. Of the first n places that reach a node, the
one child gets n * (its part of the node's weight), rounded, and the other the rest. The share of a
source is so within half a document of its weight at the first level, and `deviation_bound` of it
below: less than 1.68 documents for any number of sources, 1 for three and 0.5 for two, after any
number of documents.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.types import IntArray

_FINEST = 2**30
"""Sum of the whole numbers that stand for weights without a small common denominator."""
_LONGEST_PASS = 2**31 - 1

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Portion:
    """What a mixture takes of one source.

    `documents` are numbers of documents, `tokens` the sum of their tokens. With weights, `epochs`
    passes exhaust the source; without, a pass of the mixture holds it so many times.
    """

    name: str
    documents: IntArray
    tokens: int
    weight: float | None = None
    epochs: float = 1.0


@dataclass(frozen=True, slots=True)
class _Node:
    """A source (`source` >= 0) or two nodes."""

    weight: int
    source: int = -1
    left: _Node | None = None
    right: _Node | None = None


class Mixture:
    """An endless stream of documents, cut into passes of `length`.

    A source's own passes run on from one pass of the mixture to the next: each visits all of its
    documents once before any is repeated. There is no state: a place of the stream is a function
    of its number, the seed and the sources.
    """

    def __init__(
        self,
        portions: Sequence[Portion],
        weights: Sequence[int],
        *,
        length: int,
        seed: int,
        shuffle: bool,
        in_turn: bool = False,
    ) -> None:
        """`weights` are whole numbers; with `in_turn` each source has `weights[k]` places in a
        row, and `length` is their sum.
        """
        self.portions = list(portions)
        self.length = length
        self._weights = list(weights)
        self._seed = seed
        self._shuffle = shuffle
        self._in_turn = in_turn
        self._tree = _huffman(self._weights)

    def shares(self) -> list[float]:
        """The part of all documents that each source has in the long run."""
        return [weight / sum(self._weights) for weight in self._weights]

    def counts(self, places: int) -> list[int]:
        """How many of the first `places` places each source has."""
        total = sum(self._weights)
        whole, rest = divmod(places, total)
        counts = [whole * weight for weight in self._weights]
        if self._in_turn:
            for source, weight in enumerate(self._weights):
                counts[source] += min(rest, weight)
                rest -= min(rest, weight)
        else:
            _count(self._tree, rest, counts)
        return counts

    def order(self, number: int) -> IntArray:
        """The documents of a pass of the mixture, from 0, in order. [length] int32."""
        places = np.arange(number * self.length, (number + 1) * self.length, dtype=np.int64)
        whole, rest = np.divmod(places, sum(self._weights))
        order = np.empty(self.length, dtype=np.int32)
        for source, at, index in self._assigned(rest):
            if len(at):
                visits = whole[at] * self._weights[source] + index
                order[at] = self._documents(source, visits)
        return order

    def visits(self, passes: int) -> dict[int, int]:
        """How often each document has been visited after so many passes of the mixture."""
        found: dict[int, int] = {}
        for source, count in enumerate(self.counts(passes * self.length)):
            documents = self.portions[source].documents
            whole, rest = divmod(count, len(documents))
            order = self._source_pass(source, whole)
            for place, document in enumerate(documents[order].tolist()):
                found[document] = whole + (place < rest)
        return found

    def deviation_bound(self, source: int) -> float:
        """Documents by which a source's count can differ from its share, at any place."""
        path = _path(self._tree, source)
        weight = self._weights[source]
        return 0.5 * sum(weight / node.weight for node in path[1:]) if len(path) > 1 else 0.0

    def _assigned(self, rest: Places) -> list[tuple[int, Places, Places]]:
        """For each source where in `rest` its places are, and its number of each, from 0."""
        if not self._in_turn:
            return _assign(self._tree, np.arange(len(rest)), rest)
        ends = np.cumsum(self._weights)
        owner = np.searchsorted(ends, rest, side="right")
        assigned: list[tuple[int, Places, Places]] = []
        for source, end in enumerate(ends.tolist()):
            at = np.flatnonzero(owner == source)
            assigned.append((source, at, rest[at] - (end - self._weights[source])))
        return assigned

    def _documents(self, source: int, visits: Places) -> IntArray:
        """The documents of a source's visits, which are consecutive numbers."""
        documents = self.portions[source].documents
        passes, within = np.divmod(visits, len(documents))
        if not self._shuffle or len(documents) == 1:
            return documents[within]
        chosen = np.empty(len(visits), dtype=np.int32)
        start = 0
        for number in range(int(passes[0]), int(passes[-1]) + 1):
            end = int(np.searchsorted(passes, number, side="right"))
            chosen[start:end] = documents[self._source_pass(source, number)[within[start:end]]]
            start = end
        return chosen

    def _source_pass(self, source: int, number: int) -> NDArray[np.int64]:
        count = len(self.portions[source].documents)
        if not self._shuffle:
            return np.arange(count)
        key = (self._seed, number, source + 1)
        return np.random.Generator(np.random.PCG64(key)).permutation(count)


def mix(
    portions: Sequence[Portion],
    *,
    by: str = "rows",
    stop: str = "all_exhausted",
    seed: int,
    shuffle: bool,
) -> Mixture:
    """The mixture of some sources.

    With weights, documents (`by="rows"`) or their tokens (`by="tokens"`) are shared out by weight,
    and a pass ends before any source has been seen more than its `epochs`
    (`stop="first_exhausted"`) or once all have been seen as often (`"all_exhausted"`). Without
    weights a pass is each source `epochs` times: evenly mixed, or one source after the other where
    nothing is shuffled.

    A share of tokens becomes one of documents by the source's mean length, w / (tokens /
    documents), so it is exact over each whole pass of a source and, inside of one, as even as its
    lengths are.

    Raises:
        DataError: a source has nothing left to learn from, or no place in a pass.
    """
    for portion in portions:
        if not len(portion.documents):
            raise DataError(
                "nothing of it is left to learn from, so it can't be mixed in",
                where=portion.name,
                hint="take it out of data.train, or see why its rows were dropped",
            )
    exhausted = [portion.epochs * len(portion.documents) for portion in portions]
    options: dict[str, Any] = {"seed": seed, "shuffle": shuffle}
    if all(portion.weight is None for portion in portions):
        counts = [max(1, round(count)) for count in exhausted]
        length = _checked(sum(counts))
        return Mixture(portions, counts, length=length, in_turn=not shuffle, **options)
    weights = _whole_numbers([_share(portion, by) for portion in portions])
    tree = _huffman(weights)
    length = _checked(_length(tree, weights, exhausted, stop=stop))
    found = Mixture(portions, weights, length=length, **options)
    for portion, count in zip(portions, found.counts(length), strict=True):
        if count == 0:
            raise DataError(
                f"no document of it is in a pass of {length} documents over the mixture",
                where=portion.name,
                hint="give it a larger weight, or data.mix_stop=all_exhausted",
            )
    return found


def _share(portion: Portion, by: str) -> Fraction:
    weight = Fraction(repr(float(portion.weight or 0)))
    return weight * len(portion.documents) / portion.tokens if by == "tokens" else weight


def _whole_numbers(shares: Sequence[Fraction]) -> list[int]:
    """The shares as whole numbers: exactly where these are small, else to a part in 2**30."""
    denominator = math.lcm(*(share.denominator for share in shares))
    exact = [int(share * denominator) for share in shares]
    divisor = math.gcd(*exact)
    if sum(exact) // divisor <= _FINEST:
        return [number // divisor for number in exact]
    return [max(1, round(Fraction(number * _FINEST, sum(exact)))) for number in exact]


def _length(tree: _Node, weights: Sequence[int], exhausted: Sequence[float], *, stop: str) -> int:
    """The most places at which no source is past its end, or the fewest at which all are there."""
    total = sum(weights)

    def reached(places: int) -> list[float]:
        whole, rest = divmod(places, total)
        counts = [whole * weight for weight in weights]
        _count(tree, rest, counts)
        return [count - end for count, end in zip(counts, exhausted, strict=True)]

    def done(places: int) -> bool:
        over = reached(places)
        return max(over) > 0 if stop == "first_exhausted" else min(over) >= 0

    low, high = 0, 1
    while not done(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if done(middle) else (middle, high)
    return low if stop == "first_exhausted" else high


def _checked(length: int) -> int:
    if length > _LONGEST_PASS:
        raise DataError(
            f"a pass over the mixture would be {length:,} documents",
            where="data.train",
            hint="give small sources a smaller weight, or data.mix_stop=first_exhausted",
        )
    return length


def _huffman(weights: Sequence[int]) -> _Node:
    """The tree in which the two lightest nodes are joined until one is left."""
    heap = [(weight, number, _Node(weight, number)) for number, weight in enumerate(weights)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        light, heavy = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        joined = _Node(light.weight + heavy.weight, left=light, right=heavy)
        heapq.heappush(heap, (joined.weight, number, joined))
        number += 1
    return heap[0][2]


def _count(node: _Node, places: int, counts: list[int]) -> None:
    """Add each source's part of a node's first `places` places."""
    if node.left is None or node.right is None:
        counts[node.source] += places
        return
    left = (2 * places * node.left.weight + node.weight) // (2 * node.weight)
    _count(node.left, left, counts)
    _count(node.right, places - left, counts)


def _assign(node: _Node, at: Places, index: Places) -> list[tuple[int, Places, Places]]:
    """Split places `at`, which are the node's numbers `index`, among its sources."""
    if node.left is None or node.right is None:
        return [(node.source, at, index)]
    # Below 2**31 times 2**31, so whole numbers of 64 bits hold it.
    before = (index * node.left.weight + node.weight // 2) // node.weight
    after = ((index + 1) * node.left.weight + node.weight // 2) // node.weight
    goes_left = after > before
    return _assign(node.left, at[goes_left], before[goes_left]) + _assign(
        node.right, at[~goes_left], (index - before)[~goes_left]
    )


def _path(node: _Node, source: int) -> list[_Node]:
    """The nodes from the top to a source; empty where it is not below."""
    if node.source == source:
        return [node]
    for child in (node.left, node.right):
        if child is not None and (path := _path(child, source)):
            return [node, *path]
    return []
