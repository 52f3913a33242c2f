"""Documents that packing cut or joined, built lazily one by one.

Packs of `bfd` and `bfd_split` keep their documents apart, so a pack is only a group of documents
that one step learns from, and what is cut off a document is a document of its own. A pack of
`wrapped` is one document: text after text, each seeing all that stands before it in the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.packing.strategies import Numbers, Spans
from tunesmith.data.preprocess.document_store import (
    Counted,
    longest_paths,
    source_numbers,
    target_counts,
    token_counts,
)
from tunesmith.types import Document, FloatArray, IntArray, Segment


@dataclass(frozen=True, slots=True)
class Line:
    """A document of one path as one run of tokens; the places of its targets in it."""

    ids: IntArray  # [n]
    place: Numbers  # [k]
    weight: FloatArray  # [k]
    message: IntArray  # [k]


def line_of(document: Document) -> Line:
    """The one path of a document that is a line."""
    segments = document.segments
    return Line(
        np.concatenate([one.ids for one in segments]),
        np.concatenate([one.start + one.index.astype(np.int64) for one in segments]),
        np.concatenate([one.weight for one in segments]),
        np.concatenate([one.message for one in segments]),
    )


class Pieces(Counted):
    """Documents made of spans of others: number k joins `spans[bounds[k]:bounds[k + 1]]`.

    Positions count from 0 in each. The first token of a piece has nothing before it to be predicted
    from, so it is no target there; where a text that is learned whole (every token but its first a
    target) follows another, that first token is a target too. A span that is cut, or joined to
    others, is of a line.
    """

    def __init__(self, documents: Sequence[Document], spans: Spans, bounds: Numbers) -> None:
        self._of = documents
        self._spans = spans
        self._bounds = bounds
        self._whole = token_counts(documents).astype(np.int64)
        self._targets = target_counts(documents).astype(np.int64)
        names, numbers = source_numbers(documents)
        self.names = names
        self.span_tokens = spans.lengths
        self.span_targets = self._count_targets()
        firsts = spans.item[bounds[:-1]]
        joined = np.diff(bounds) > 1
        self.sources: IntArray = numbers[firsts]
        self.tokens: IntArray = _sums(self.span_tokens, bounds).astype(np.int32)
        self.target_tokens: IntArray = _sums(self.span_targets, bounds).astype(np.int32)
        cut = joined | (spans.lengths[bounds[:-1]] < self._whole[firsts])
        self.longest_paths: IntArray = np.where(
            cut, self.tokens, longest_paths(documents)[firsts]
        ).astype(np.int32)

    def owners(self) -> tuple[Numbers, Numbers]:
        """For each span its document, and the piece that it is in."""
        piece = np.repeat(np.arange(len(self)), np.diff(self._bounds))
        return self._spans.item, piece

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, at: int) -> Document: ...
    @overload
    def __getitem__(self, at: slice) -> list[Document]: ...
    def __getitem__(self, at: int | slice) -> Document | list[Document]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        number = at + len(self) if at < 0 else at
        if not 0 <= number < len(self):
            raise IndexError(f"document {at} of {len(self)}")
        first, end = int(self._bounds[number]), int(self._bounds[number + 1])
        item = int(self._spans.item[first])
        if end - first == 1 and int(self._spans.lengths[first]) == int(self._whole[item]):
            return self._of[item]
        parts = [self._part(span, joins=span > first) for span in range(first, end)]
        before = np.cumsum([0, *(len(part.ids) for part in parts[:-1])])
        places = [part.place + start for part, start in zip(parts, before, strict=True)]
        segment = Segment(
            ids=np.concatenate([part.ids for part in parts]),
            parent=-1,
            start=0,
            index=np.concatenate(places).astype(np.int32),
            weight=np.concatenate([part.weight for part in parts]),
            message=np.concatenate([part.message for part in parts]),
        )
        return Document((segment,), self._of[item].origin)

    def _part(self, span: int, *, joins: bool) -> Line:
        item = int(self._spans.item[span])
        start, end = int(self._spans.start[span]), int(self._spans.end[span])
        line = line_of(self._of[item])
        inside = (line.place >= start + (0 if joins else 1)) & (line.place < end)
        place, weight, message = (
            line.place[inside] - start, line.weight[inside], line.message[inside]
        )  # fmt: skip
        if joins and self._learned_whole(item) and start == 0:
            place = np.concatenate([[0], place])
            weight = np.concatenate([line.weight[:1], weight])
            message = np.concatenate([line.message[:1], message])
        return Line(line.ids[start:end], place, weight, message)

    def _learned_whole(self, items: NDArray[np.int64] | int) -> NDArray[np.bool_]:
        return self._targets[items] == self._whole[items] - 1

    def _count_targets(self) -> Numbers:
        """Targets in each span; only documents that are cut are looked into."""
        item, start, end = self._spans.item, self._spans.start, self._spans.end
        first = np.zeros(len(item), bool)
        first[self._bounds[:-1]] = True
        counts = self._targets[item] + (~first & (start == 0) & self._learned_whole(item))
        for span in np.flatnonzero((start > 0) | (end < self._whole[item])).tolist():
            counts[span] = len(self._part(span, joins=not first[span]).place)
        return counts


def _sums(values: Numbers, bounds: Numbers) -> Numbers:
    reached = np.concatenate([[0], np.cumsum(values)])
    return np.diff(reached[bounds])
