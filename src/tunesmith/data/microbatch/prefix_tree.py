"""The prefix tree (trie) of a step: tokens that documents share from their start are computed once.

Invariant: the paths of the tree that carry targets are exactly the paths of the documents, and
every target of every document hangs at the position that must predict it. Tokens that no target
needs (an answer's last token, say) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import Document, IntArray, Segment


@dataclass(slots=True)
class Targets:
    """Targets of one document at one node; `position` is that of the token which predicts."""

    position: NDArray[np.int64]  # [k] counted from the root of the tree
    ids: IntArray  # [k]
    weight: NDArray[np.float32]  # [k]
    document: int

    def between(self, low: int, high: int) -> Targets | None:
        """The targets predicted from positions low <= p < high, None if there are none."""
        inside = (self.position >= low) & (self.position < high)
        if not inside.any():
            return None
        return Targets(self.position[inside], self.ids[inside], self.weight[inside], self.document)


@dataclass(slots=True, eq=False)
class Node:
    """A run of tokens without a branch inside."""

    ids: IntArray
    start: int  # position of ids[0]
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict[int, "Node"])  # by first id
    targets: list[Targets] = field(default_factory=list[Targets])
    size: int = 0  # tokens of this node and everything below it; set by `measure`

    @property
    def end(self) -> int:
        """Position after the last token; also the length of the path down to here."""
        return self.start + len(self.ids)


def build_forest(documents: Sequence[Document], *, share_prefixes: bool) -> list[Node]:
    """Roots of the documents' trees: one virtual (empty) root for all if `share`, else one for each
    single path.

    Without sharing, a segment that several paths of a document run through keeps its targets on the
    first of them.
    """
    if share_prefixes:
        root = new_root()
        for number, document in enumerate(documents):
            _insert(root, document.segments, number)
        roots = [root]
    else:
        roots: list[Node] = []
        for number, document in enumerate(documents):
            for path in single_paths(document.segments):
                root = new_root()
                _insert(root, path, number)
                roots.append(root)
    for root in roots:
        measure(root)
    return [root for root in roots if root.size]


def new_root() -> Node:
    return Node(np.empty(0, np.int32), 0, None)


def single_paths(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Each root-to-leaf path as a document of its own, every target on exactly one of them."""
    inner = {segment.parent for segment in segments}
    emitted: set[int] = set()
    for leaf in range(len(segments)):
        if leaf in inner:
            continue
        numbers = [leaf]
        while segments[numbers[-1]].parent >= 0:
            numbers.append(segments[numbers[-1]].parent)
        path: list[Segment] = []
        for place, number in enumerate(reversed(numbers)):
            old = segments[number]
            keep = slice(0, 0) if number in emitted else slice(None)
            emitted.add(number)
            path.append(
                Segment(
                    old.ids,
                    place - 1,
                    old.start,
                    old.index[keep],
                    old.weight[keep],
                    old.message[keep],
                )
            )
        yield path


def measure(root: Node) -> int:
    """Fill in `size` below `root`; without recursion, since chats can be deep."""
    order: list[Node] = [root]
    for node in order:
        order.extend(node.children.values())
    for node in reversed(order):
        node.size = len(node.ids) + sum(child.size for child in node.children.values())
    return root.size


def _needed_lengths(segments: Sequence[Segment]) -> list[int]:
    """How many tokens of each segment must be run: up to the last one that predicts a target or has
    a follower that must.
    """
    needed = [0] * len(segments)
    for number in range(len(segments) - 1, -1, -1):
        segment = segments[number]
        if len(segment.index):
            needed[number] = max(needed[number], int(segment.index[-1]))
        below = needed[number] > 0 or len(segment.index) > 0
        if below and segment.parent >= 0:
            needed[segment.parent] = len(segments[segment.parent].ids)
    return needed


def _insert(root: Node, segments: Sequence[Segment], document: int) -> None:
    ends: list[Node] = []  # the node in which each segment's last token stands
    for segment, needed in zip(segments, _needed_lengths(segments), strict=True):
        above = ends[segment.parent] if segment.parent >= 0 else root
        above = _holder(above, segment.start)
        last = _insert_ids(above, segment.ids[:needed], segment.start)
        ends.append(last)
        if len(segment.index):
            sources = segment.start + segment.index.astype(np.int64) - 1
            targets = Targets(sources, segment.ids[segment.index], segment.weight, document)
            _hang(last, targets)


def _holder(node: Node, end: int) -> Node:
    """The ancestor-or-self of `node` that holds position end - 1 (a later split may have moved it
    up).
    """
    while node.parent is not None and node.start >= end:
        node = node.parent
    return node


def _insert_ids(node: Node, ids: IntArray, start: int) -> Node:
    """Walk or grow from position `start` (inside or at the end of `node`) along `ids`; the node of
    the last one.
    """
    done = 0
    while done < len(ids):
        inside = start + done - node.start
        if inside < len(node.ids):
            rest = node.ids[inside:]
            same = _common_length(rest, ids[done:])
            done += same
            if done == len(ids):
                return node
            if same < len(rest):
                node = _split(node, start + done)
            continue
        child = node.children.get(int(ids[done]))
        if child is None:
            child = Node(np.asarray(ids[done:], np.int32), start + done, node)
            node.children[int(ids[done])] = child
            return child
        node = child
    return node


def _split(node: Node, position: int) -> Node:
    """Cut `node` before `position` and return the new upper part; `node` itself stays the lower
    part.
    """
    assert node.parent is not None
    assert node.start < position < node.end
    upper = Node(node.ids[: position - node.start], node.start, node.parent)
    node.parent.children[int(upper.ids[0])] = upper
    node.ids = node.ids[position - node.start :]
    upper.children[int(node.ids[0])] = node
    upper.targets = [part for t in node.targets if (part := t.between(0, position))]
    node.targets = [part for t in node.targets if (part := t.between(position, node.start + 2**62))]
    node.parent, node.start = upper, position
    return upper


def _hang(node: Node, targets: Targets) -> None:
    """Give each target to the node, here or above, that holds the token which predicts it."""
    while True:
        here = targets.between(node.start, node.end)
        if here is not None:
            node.targets.append(here)
        rest = targets.between(0, node.start)
        if rest is None:
            return
        assert node.parent is not None
        targets, node = rest, node.parent


def _common_length(a: IntArray, b: IntArray) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
