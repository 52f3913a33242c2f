"""The prefix tree (a radix tree) of a step: a prefix that several documents begin with is stored
once.

Invariant: the root-to-target paths of the tree are exactly those of the documents, and every target
of every document is attached to the position that must predict it. Tokens that no target needs,
such as the last token of an answer, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import Document, IntArray, Segment


@dataclass(slots=True)
class Targets:
    """The targets of one document at one node; `position` is that of the token that predicts
    each.
    """

    position: NDArray[np.int64]  # [k] counted from the root of the tree
    ids: IntArray  # [k]
    weight: NDArray[np.float32]  # [k]
    document: int

    def between(self, low: int, high: int) -> Targets | None:
        """The targets that are predicted from positions low <= p < high; None if there are none."""
        inside = (self.position >= low) & (self.position < high)
        if not inside.any():
            return None
        return Targets(self.position[inside], self.ids[inside], self.weight[inside], self.document)


@dataclass(slots=True, eq=False)
class Node:
    """A node of the radix tree: a run of tokens without a branch inside."""

    ids: IntArray
    start: int  # position of ids[0]
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict[int, "Node"])  # by first id
    targets: list[Targets] = field(default_factory=list[Targets])
    size: int = 0  # tokens of the subtree, this node included; set by `measure`

    @property
    def end(self) -> int:
        """The position after the last token, which is the length of the path down to here."""
        return self.start + len(self.ids)


def build_forest(documents: Sequence[Document], *, share_prefixes: bool) -> list[Node]:
    """Build the trees of a step's documents and return their roots, which are empty nodes.

    With `share_prefixes` there is one root for all documents, else one for each root-to-leaf path.
    In the second case a segment on several paths of a document keeps its targets on the first of
    them.
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
    """Yield each root-to-leaf path as segments of its own, every target on exactly one of them."""
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
    """Set `size` of every node below `root`. It uses no recursion, since long chats make deep
    trees.
    """
    order: list[Node] = [root]
    for node in order:
        order.extend(node.children.values())
    for node in reversed(order):
        node.size = len(node.ids) + sum(child.size for child in node.children.values())
    return root.size


def _needed_lengths(segments: Sequence[Segment]) -> list[int]:
    """The number of tokens of each segment that must be computed.

    It is up to the last token that predicts a target, or all if a segment that continues it is
    needed.
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
    ends: list[Node] = []  # the node that holds each segment's last token
    for segment, needed in zip(segments, _needed_lengths(segments), strict=True):
        above = ends[segment.parent] if segment.parent >= 0 else root
        # An earlier insert may have split the parent's node, so the parent's last token may be
        # higher up.
        above = _node_holding(above, segment.start)
        last = _insert_ids(above, segment.ids[:needed], segment.start)
        ends.append(last)
        if len(segment.index):
            sources = segment.start + segment.index.astype(np.int64) - 1
            targets = Targets(sources, segment.ids[segment.index], segment.weight, document)
            _attach(last, targets)


def _node_holding(node: Node, end: int) -> Node:
    """The node or ancestor that holds position end - 1, which a later split may have moved
    upwards.
    """
    while node.parent is not None and node.start >= end:
        node = node.parent
    return node


def _insert_ids(node: Node, ids: IntArray, start: int) -> Node:
    """Follow `ids` from position `start`, inside or at the end of `node`, and add what is missing.
    Returns the node that holds the last id.
    """
    done = 0
    while done < len(ids):
        inside = start + done - node.start
        if inside < len(node.ids):
            below = node.ids[inside:]
            same = _common_length(below, ids[done:])
            done += same
            if done == len(ids):
                return node
            if same < len(below):
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
    """Split `node` before `position` and return the new upper part; `node` itself becomes the lower
    part.
    """
    assert node.parent is not None
    assert node.start < position < node.end
    upper = Node(node.ids[: position - node.start], node.start, node.parent)
    node.parent.children[int(upper.ids[0])] = upper
    node.ids = node.ids[position - node.start :]
    upper.children[int(node.ids[0])] = node
    # Each target stays with the token that predicts it.
    upper.targets = [part for t in node.targets if (part := t.between(0, position))]
    node.targets = [part for t in node.targets if (part := t.between(position, node.start + 2**62))]
    node.parent, node.start = upper, position
    return upper


def _attach(node: Node, targets: Targets) -> None:
    """Attach each target to the node, this one or an ancestor, that holds the token which predicts
    it.
    """
    while True:
        here = targets.between(node.start, node.end)
        if here is not None:
            node.targets.append(here)
        above = targets.between(0, node.start)
        if above is None:
            return
        assert node.parent is not None
        targets, node = above, node.parent


def _common_length(a: IntArray, b: IntArray) -> int:
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
