"""Token paths with targets, merged into the segments of one document (a radix tree of its paths).

A chat whose template rewrites earlier turns has one path per answer; equal prefixes are kept once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tunesmith.data.rendering.result import NO_TARGETS, TOO_LONG, Limit, Rendered, over_long
from tunesmith.types import NO_MESSAGE, Document, IntArray, Origin, Segment


@dataclass(frozen=True, slots=True)
class TokenPath:
    """The ids of a path from the root, of which [first, end), first >= 1, are the targets of one
    message.
    """

    ids: IntArray
    first: int
    end: int
    weight: float
    message: int


@dataclass(slots=True, eq=False)
class _Node:
    ids: IntArray
    start: int
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=lambda: dict[int, _Node]())
    targets: list[tuple[int, int, float, int]] = field(
        default_factory=list[tuple[int, int, float, int]]
    )


def merge_paths(paths: Sequence[TokenPath]) -> tuple[Segment, ...]:
    """Merge paths to the segments of their radix tree, parents first, with no needless splits.

    No token may be a target of two paths.
    """
    if len(paths) == 1:
        return (_single(paths[0]),)
    root = _Node(np.empty(0, np.int32), 0, None)
    for path in paths:
        _insert(root, path.ids)
    for path in paths:
        _place(root, path)
    return tuple(_segments(root))


def _single(path: TokenPath) -> Segment:
    count = path.end - path.first
    return Segment(
        ids=path.ids,
        parent=-1,
        start=0,
        index=np.arange(path.first, path.end, dtype=np.int32),
        weight=np.full(count, path.weight, np.float32),
        message=np.full(count, path.message, np.int32),
    )


def _insert(root: _Node, ids: IntArray) -> None:
    node, done = root, 0
    while done < len(ids):
        child = node.children.get(int(ids[done]))
        if child is None:
            # A leaf that the new path continues is extended in place instead of getting a child.
            if node.children or node is root:
                node.children[int(ids[done])] = _Node(ids[done:], done, node)
            else:
                node.ids = np.concatenate([node.ids, ids[done:]])
            return
        same = common_length(child.ids, ids[done:])
        done += same
        if same < len(child.ids) and done < len(ids):
            _split(child, same)
        node = child


def _split(node: _Node, length: int) -> None:
    """Keep the first `length` ids in `node` and move the rest into a new only child."""
    lower = _Node(node.ids[length:], node.start + length, node, node.children)
    for child in lower.children.values():
        child.parent = lower
    node.ids = node.ids[:length]
    node.children = {int(lower.ids[0]): lower}


def _place(root: _Node, path: TokenPath) -> None:
    """Give each node on the path its part of the targets."""
    node, done = root, 0
    while done < path.end:
        node = node.children[int(path.ids[done])]
        first = max(path.first - node.start, 0)
        end = min(path.end - node.start, len(node.ids))
        if first < end:
            node.targets.append((first, end, path.weight, path.message))
        done += len(node.ids)


def _segments(root: _Node) -> Iterator[Segment]:
    numbers: dict[int, int] = {id(root): -1}
    waiting = list(reversed(root.children.values()))
    while waiting:
        node = waiting.pop()
        assert node.parent is not None
        parent = numbers[id(node.parent)]
        numbers[id(node)] = len(numbers) - 1
        yield make_segment(node.ids, node.targets, parent=parent, start=node.start)
        waiting.extend(reversed(node.children.values()))


def make_segment(
    ids: IntArray,
    targets: Sequence[tuple[int, int, float, int]],
    *,
    parent: int = -1,
    start: int = 0,
) -> Segment:
    """A segment with targets given as (first, end, weight, message), in any order, not
    overlapping.
    """
    ordered = sorted(targets)
    counts = [end - first for first, end, _, _ in ordered]
    ranges = [np.arange(first, end, dtype=np.int32) for first, end, _, _ in ordered]
    return Segment(
        ids=np.asarray(ids, np.int32),
        parent=parent,
        start=start,
        index=np.concatenate(ranges) if ranges else np.empty(0, np.int32),
        weight=np.repeat(np.array([t[2] for t in ordered], np.float32), counts),
        message=np.repeat(np.array([t[3] for t in ordered], np.int32), counts),
    )


def fit_paths(paths: Sequence[TokenPath], limit: Limit, origin: Origin, unused: int) -> Rendered:
    """The document of the paths; with a limit only of the paths that fit, since a path is never
    cut.

    Raises:
        RowError: a path is too long, and `too_long` is error.
    """
    segments = merge_paths(paths)
    tokens = sum(len(segment.ids) for segment in segments) + unused
    max_length, too_long = limit
    longest = max(len(path.ids) for path in paths)
    if max_length is None or longest <= max_length:
        return Rendered(Document(segments, origin), "trained", None, tokens, unused)
    if too_long == "error":
        raise over_long(longest, max_length)
    kept = [path for path in paths if len(path.ids) <= max_length]
    if too_long == "drop" or not kept:
        return Rendered(None, "dropped", TOO_LONG, tokens, 0)
    return Rendered(Document(merge_paths(kept), origin), "truncated", TOO_LONG, tokens, unused)


def fit_stream(
    array: IntArray, first: int, limit: Limit, origin: Origin, *, whole: bool = False
) -> Rendered:
    """The document of one run of tokens with targets from `first` on; `whole`: it can't be
    truncated.

    With `split` it becomes several pieces, each with its own root.

    Raises:
        RowError: it is too long, and `too_long` is error.
    """
    max_length, too_long = limit
    if len(array) <= first:
        return Rendered(None, "dropped", NO_TARGETS, len(array), 0)
    if max_length is None or len(array) <= max_length:
        pieces = [(0, len(array))]
    elif too_long == "error":
        raise over_long(len(array), max_length)
    elif too_long == "split":
        pieces = _cuts(len(array), max_length)
    elif too_long == "truncate" and not whole:
        pieces = [(0, max_length)]
    else:
        return Rendered(None, "dropped", TOO_LONG, len(array), 0)
    segments = [_piece(array, first, start, end) for start, end in pieces]
    kept = tuple(segment for segment in segments if len(segment.index))
    if not kept:  # a single token is left, with nothing before it to predict it
        return Rendered(None, "dropped", TOO_LONG, len(array), 0)
    cut = sum(len(segment.ids) for segment in kept) < len(array)
    return Rendered(
        Document(kept, origin),
        "truncated" if cut else "trained",
        TOO_LONG if cut else None,
        len(array),
        0,
    )


def _piece(ids: IntArray, first: int, start: int, end: int) -> Segment:
    begin = max(first - start, 1)
    message = [(begin, end - start, 1.0, NO_MESSAGE)] if begin < end - start else []
    return make_segment(ids[start:end], message)


def _cuts(length: int, size: int) -> list[tuple[int, int]]:
    """Pieces of at most `size` tokens; the last one is never a single token if `size` is above
    2.
    """
    starts = list(range(0, length, size))
    if length - starts[-1] == 1 and size > 2:
        starts[-1] -= 1
    return list(zip(starts, [*starts[1:], length], strict=True))


def common_length(a: IntArray, b: IntArray) -> int:
    """The number of equal ids at the beginning of both."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length
