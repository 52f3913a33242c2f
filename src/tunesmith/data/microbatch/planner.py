"""The micro-batch planner: a step's prefix tree is cut into few balanced micro-batches (bin
packing, best-fit decreasing) and each is laid out depth first (tree attention).

Invariant: over the micro-batches of a step, every target of every document appears exactly once,
and a token sees its ancestors in its document and nothing else. How a step is cut changes only
speed and memory: a prefix that is cut apart is computed in each micro-batch that needs it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.microbatch.prefix_tree import Node, build_forest
from tunesmith.types import Chain, Document, FloatArray, IntArray, Layout, TargetOwners


@dataclass(frozen=True, slots=True)
class Part:
    """The whole micro-batch of which this rank has a shard (context parallelism)."""

    whole: MicrobatchPlan
    targets: IntArray  # places of this rank's targets among those of the whole
    tokens: int  # counted for this rank; over all ranks they sum to the tokens of the whole


@dataclass(frozen=True, slots=True)
class MicrobatchPlan:
    """One micro-batch: the arrays of a `Batch` in numpy, before they are moved to the device.

    Shapes: T packed tokens, N distinct (source, target) pairs, M (target, document) pairs. Under
    context parallelism T and N are this rank's, and `layout` covers the tokens of all ranks.
    """

    ids: IntArray  # [T]
    layout: Layout  # over T
    packed: bool  # false: a single sequence, run without a layout
    source: IntArray  # [N]
    target: IntArray  # [N]
    weight: FloatArray  # [N]
    owners: TargetOwners  # [M]
    part: Part | None = None  # None: the micro-batch is one process's

    @property
    def tokens(self) -> int:
        """Tokens that go through the decoder."""
        return len(self.ids)

    @property
    def counted(self) -> int:
        """Tokens in which each is counted on one rank only, so that ranks can be summed."""
        return self.tokens if self.part is None else self.part.tokens


@dataclass(slots=True)
class _Bin:
    """Subtrees that go into the same micro-batch. `cost` is the number of tokens below the node at
    which the bins are packed.
    """

    cost: int
    subtrees: list[Node]


def plan_step(
    documents: Sequence[Document],
    *,
    micro_tokens: int,
    share_prefixes: bool = True,
    unpacked: bool = False,
) -> list[MicrobatchPlan]:
    """The micro-batches of a step, largest first.

    A micro-batch holds at most `micro_tokens` tokens, or the longest single sequence where that is
    longer. `share_prefixes` merges equal prefixes of documents. `unpacked` gives every root-to-leaf
    path a micro-batch of its own, which is run without a layout.
    """
    if unpacked:
        roots = build_forest(documents, share_prefixes=False)
        plans = [_lay_out([root], set(), packed=False) for root in roots]
        return sorted(plans, key=lambda plan: -plan.tokens)
    roots = build_forest(documents, share_prefixes=share_prefixes)
    tops = [child for root in roots for child in root.children.values()]
    if not tops:
        return []
    # No path can be cut, so the longest one is the least capacity that works.
    capacity = max(micro_tokens, max(node.end for top in tops for node in _subtree(top)))
    bins: list[_Bin] = []
    for top in tops:
        bins.extend(_cut(top, capacity))
    # A node that several micro-batches compute learns its targets in the first of them only.
    owned: set[int] = set()
    plans: list[MicrobatchPlan] = []
    for packed in sorted(_pack(bins, capacity), key=lambda b: -b.cost):
        plans.append(_lay_out(packed.subtrees, owned, packed=True))
    return sorted(plans, key=lambda plan: -plan.tokens)


def _subtree(node: Node) -> list[Node]:
    order = [node]
    for item in order:
        order.extend(item.children.values())
    return order


def _cut(top: Node, capacity: int) -> list[_Bin]:
    """Cut the subtree `top` into pieces of at most `capacity` tokens, each with the path down to
    it.

    Costs count from the first token of `top`, so that a parent can pack the pieces of its children.
    """
    pieces: dict[Node, list[_Bin]] = {}
    # Children come before parents: a node either fits whole, or packs what its children gave.
    for node in reversed(_subtree(top)):
        if node.start + node.size <= capacity:
            pieces[node] = [_Bin(node.size, [node])]
            for child in node.children.values():
                del pieces[child]
            continue
        parts = [part for child in node.children.values() for part in pieces.pop(child)]
        # Every piece repeats the path down to here, so that much of the capacity is taken.
        packed = _pack(parts, capacity - node.end)
        pieces[node] = [_Bin(part.cost + len(node.ids), part.subtrees) for part in packed]
    return pieces[top]


def _pack(items: list[_Bin], capacity: int) -> list[_Bin]:
    """Pack items into few bins of similar cost.

    The number of bins is that of best-fit decreasing. The items are then assigned longest first to
    the bin with the least cost (LPT scheduling, Graham 1969), which balances the bins; if that
    exceeds the capacity, the bins of best-fit decreasing are used.
    """
    count = _best_fit_count([item.cost for item in items], capacity)
    if count == len(items):
        return items
    order = sorted(items, key=lambda item: -item.cost)
    heap: list[tuple[int, int]] = [(0, number) for number in range(count)]
    bins = [_Bin(0, []) for _ in range(count)]
    for item in order:
        cost, number = heapq.heappop(heap)
        bins[number].cost = cost + item.cost
        bins[number].subtrees.extend(item.subtrees)
        heapq.heappush(heap, (bins[number].cost, number))
    if max(b.cost for b in bins) <= capacity:
        return [b for b in bins if b.subtrees]
    return _best_fit(order, capacity)


def _best_fit_count(costs: list[int], capacity: int) -> int:
    return len(_best_fit([_Bin(cost, []) for cost in sorted(costs, reverse=True)], capacity))


def _best_fit(decreasing: list[_Bin], capacity: int) -> list[_Bin]:
    """Best-fit decreasing: each item goes into the fullest bin that has room for it. `free` holds
    (free capacity, bin), sorted.
    """
    bins: list[_Bin] = []
    free: list[tuple[int, int]] = []
    for item in decreasing:
        place = bisect_left(free, (item.cost, -1))
        if place == len(free):
            bins.append(_Bin(0, []))
            room, number = capacity, len(bins) - 1
        else:
            room, number = free.pop(place)
        bins[number].cost += item.cost
        bins[number].subtrees.extend(item.subtrees)
        insort(free, (room - item.cost, number))
    return bins


def _lay_out(subtrees: Sequence[Node], owned: set[int], *, packed: bool) -> MicrobatchPlan:
    """Lay out subtrees and the paths to them depth first, as one micro-batch.

    Targets of nodes that are not in `owned` yet belong to this micro-batch, and are added to it.
    """
    weights = _nodes_of(subtrees)
    builder = _Builder()
    for root in sorted(
        (n for n in weights if n.parent is None or n.parent not in weights),
        key=lambda n: -weights[n],
    ):
        builder.add_tree(root, weights)
    mine = [n for n in builder.order if id(n) not in owned]
    owned.update(id(n) for n in mine)
    return builder.finish(mine, packed=packed)


def _nodes_of(subtrees: Sequence[Node]) -> dict[Node, int]:
    """The nodes of a micro-batch, each with the number of tokens at and below it in this
    micro-batch.

    They are all nodes of the subtrees and the nodes on the paths to them.
    """
    chosen: dict[Node, int] = {}
    for subtree in subtrees:
        for node in _subtree(subtree):
            chosen[node] = node.size
    for subtree in subtrees:
        added, node = subtree.size, subtree.parent
        while node is not None:
            if node not in chosen:
                chosen[node] = len(node.ids)
                added += len(node.ids)
                chosen[node] = added
            else:
                chosen[node] += added
            node = node.parent
    return chosen


class _Builder:
    """Lays out nodes one after the other and records the place of each."""

    def __init__(self) -> None:
        self.order: list[Node] = []
        self.offset: dict[Node, int] = {}
        self.chains: list[Chain] = []
        self.visible: list[tuple[int, int, int]] = []  # span of a node, and where its subtree ends
        self.total = 0

    def add_tree(self, root: Node, weights: dict[Node, int]) -> None:
        """Add a tree in depth-first order, the child with the most tokens first.

        A node's first child follows it without a gap, so the longest chain of each tree is one
        contiguous causal run, which attention kernels handle fastest.
        """
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, leaving = stack.pop()
            start = self.offset.get(node, -1)
            if leaving:
                self.visible.append((start, start + len(node.ids), self.total))
                continue
            self._place(node)
            stack.append((node, True))
            children = [child for child in node.children.values() if child in weights]
            children.sort(key=lambda child: weights[child])
            stack.extend((child, False) for child in children)

    def _place(self, node: Node) -> None:
        start, end = self.total, self.total + len(node.ids)
        self.order.append(node)
        self.offset[node] = start
        self.total = end
        if start == end:
            return
        spans = self._ancestor_spans(node)
        # The node continues the run before it: the chain grows instead of a new one.
        if spans and spans[-1][1] == start and self.chains[-1].end == start:
            last = self.chains.pop()
            self.chains.append(Chain(last.start, end, last.prefix))
        else:
            self.chains.append(Chain(start, end, tuple(spans)))

    def _ancestor_spans(self, node: Node) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        above = node.parent
        while above is not None:
            if len(above.ids):
                start = self.offset[above]
                end = start + len(above.ids)
                if spans and spans[-1][0] == end:
                    spans[-1] = (start, spans[-1][1])
                else:
                    spans.append((start, end))
            above = above.parent
        return spans[::-1]

    def finish(self, mine: list[Node], *, packed: bool) -> MicrobatchPlan:
        ids = np.concatenate([node.ids for node in self.order])
        position = np.concatenate([np.arange(n.start, n.end, dtype=np.int32) for n in self.order])
        visible = np.empty(self.total, np.int32)
        for start, end, until in self.visible:
            visible[start:end] = until
        layout = Layout(tuple(self.chains), visible, position)
        source, target, weight, owners = self._targets(mine)
        return MicrobatchPlan(ids, layout, packed, source, target, weight, owners)

    def _targets(self, mine: list[Node]) -> tuple[IntArray, IntArray, FloatArray, TargetOwners]:
        parts = [(node, targets) for node in mine for targets in node.targets]
        if not parts:
            none, zero = np.empty(0, np.int32), np.empty(0, np.float32)
            return none, none, zero, TargetOwners(none, none, zero)
        sources = np.concatenate([t.position - n.start + self.offset[n] for n, t in parts])
        targets = np.concatenate([t.ids for _, t in parts]).astype(np.int64)
        weight = np.concatenate([t.weight for _, t in parts])
        document = np.concatenate([np.full(len(t.ids), t.document, np.int32) for _, t in parts])
        # The same source may predict the same token for several documents, which then share one
        # target whose weight is the sum.
        pairs, which = _unique_pairs(sources, targets)
        summed = np.bincount(which, weights=weight, minlength=len(pairs)).astype(np.float32)
        source, target = (pairs >> 32).astype(np.int32), (pairs & 0xFFFFFFFF).astype(np.int32)
        return source, target, summed, TargetOwners(which.astype(np.int32), document, weight)


def _unique_pairs(
    sources: NDArray[np.int64], targets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct (source, target) pairs, sorted by source, and for each pair the index of its
    distinct one.
    """
    return np.unique((sources << 32) | targets, return_inverse=True)
