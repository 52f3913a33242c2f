"""A columnar store of documents: flat numpy arrays in memory or memory-mapped, documents built on
access.

A document takes its ids, 16 bytes for each run of targets, 24 bytes for each segment and 40 bytes
for itself.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import Document, IntArray, Origin, Segment

Records = NDArray[Any]

RUN = np.dtype([("first", "<i4"), ("end", "<i4"), ("message", "<i4"), ("weight", "<f4")])
SEGMENT = np.dtype([("ids", "<i8"), ("runs", "<i8"), ("parent", "<i4"), ("start", "<i4")])
DOCUMENT = np.dtype(
    [
        ("segments", "<i8"),
        ("row", "<i8"),
        ("source", "<i4"),
        ("tokens", "<i4"),
        ("targets", "<i4"),
        ("longest", "<i4"),
    ]
)
"""The fields `ids`, `runs` and `segments` are the ends of a record's part in the array of that
name.
"""
TYPES = {"ids": np.dtype("<i4"), "runs": RUN, "segments": SEGMENT, "documents": DOCUMENT}


@dataclass(frozen=True, slots=True)
class Columns:
    """Documents as flat arrays; `source` of a document is an index into `names`."""

    ids: IntArray
    runs: Records
    segments: Records
    documents: Records
    names: tuple[str, ...]


def pack(documents: Sequence[Document]) -> Columns:
    """Pack documents into flat arrays."""
    segments = [segment for document in documents for segment in document.segments]
    names = {document.origin.source: 0 for document in documents}
    numbers = {name: number for number, name in enumerate(names)}
    table = np.zeros(len(segments), SEGMENT)
    table["parent"] = [segment.parent for segment in segments]
    table["start"] = [segment.start for segment in segments]
    lengths = np.array([len(segment.ids) for segment in segments], np.int64)
    counts = np.array([len(segment.index) for segment in segments], np.int64)
    table["ids"] = np.cumsum(lengths)
    runs, table["runs"] = _runs(segments, counts)
    rows = np.zeros(len(documents), DOCUMENT)
    sizes = np.array([len(document.segments) for document in documents], np.int64)
    rows["segments"] = np.cumsum(sizes)
    rows["row"] = [document.origin.row for document in documents]
    rows["source"] = [numbers[document.origin.source] for document in documents]
    if len(documents):
        starts = rows["segments"] - sizes
        rows["tokens"] = np.add.reduceat(lengths, starts)
        rows["targets"] = np.add.reduceat(counts, starts)
        rows["longest"] = np.maximum.reduceat(table["start"] + lengths, starts)
    return Columns(
        _concatenated([segment.ids for segment in segments]), runs, table, rows, tuple(names)
    )


def _runs(segments: Sequence[Segment], counts: NDArray[np.int64]) -> tuple[Records, Records]:
    """Run-length encode the targets: consecutive targets of one weight and message are one record.
    Returns the runs, and where each segment's runs end.
    """
    index = _concatenated([segment.index for segment in segments])
    message = _concatenated([segment.message for segment in segments])
    weight = np.concatenate([np.empty(0, np.float32), *(one.weight for one in segments)])
    owner = np.repeat(np.arange(len(segments)), counts)
    begins = np.ones(len(index), bool)
    begins[1:] = np.diff(index) != 1
    for column in (message, weight, owner):
        begins[1:] |= column[1:] != column[:-1]
    first = np.flatnonzero(begins)
    last = np.append(first[1:], len(index))[: len(first)] - 1
    runs = np.zeros(len(first), RUN)
    runs["first"], runs["end"] = index[first], index[last] + 1
    runs["message"], runs["weight"] = message[first], weight[first]
    return runs, np.searchsorted(owner[first], np.arange(len(segments)), side="right")


def _concatenated(arrays: Iterable[IntArray]) -> IntArray:
    return np.concatenate([np.empty(0, np.int32), *arrays])


class Counted(Sequence[Document]):
    """A sequence of documents whose sizes are known without building them."""

    names: tuple[str, ...]  # of the sources of the documents
    sources: IntArray  # index into `names` of each document's source
    tokens: IntArray  # of each document
    target_tokens: IntArray  # targets of each document
    longest_paths: IntArray  # of each document, in tokens


class Documents(Counted):
    """The documents of `Columns`; each is built on access and shares the arrays' memory."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.names = columns.names
        self.sources = columns.documents["source"]
        self.tokens = columns.documents["tokens"]
        self.target_tokens = columns.documents["targets"]
        self.longest_paths = columns.documents["longest"]

    def __len__(self) -> int:
        return len(self._columns.documents)

    @overload
    def __getitem__(self, at: int) -> Document: ...
    @overload
    def __getitem__(self, at: slice) -> list[Document]: ...
    def __getitem__(self, at: int | slice) -> Document | list[Document]:
        if isinstance(at, slice):
            return [self._document(number) for number in range(*at.indices(len(self)))]
        number = at + len(self) if at < 0 else at
        if not 0 <= number < len(self):
            raise IndexError(f"document {at} of {len(self)}")
        return self._document(number)

    def highest_id(self) -> tuple[int, Origin]:
        """The largest id and a row that has it."""
        columns = self._columns
        at = int(columns.ids.argmax())
        segment = int(np.searchsorted(columns.segments["ids"], at, side="right"))
        number = int(np.searchsorted(columns.documents["segments"], segment, side="right"))
        one = columns.documents[number]
        return int(columns.ids[at]), Origin(columns.names[int(one["source"])], int(one["row"]))

    def _document(self, number: int) -> Document:
        columns = self._columns
        numbers: tuple[int, ...] = tuple(columns.documents[number].item())
        end, row, source = numbers[:3]
        begin = int(columns.documents["segments"][number - 1]) if number else 0
        segments = tuple(self._segment(place) for place in range(begin, end))
        return Document(segments, Origin(columns.names[source], row))

    def _segment(self, place: int) -> Segment:
        columns = self._columns
        ids_end, runs_end, parent, start = columns.segments[place].item()
        ids_begin, runs_begin = 0, 0
        if place:
            ids_begin, runs_begin, *_ = columns.segments[place - 1].item()
        runs = columns.runs[runs_begin:runs_end]
        lengths = runs["end"] - runs["first"]
        if len(runs) == 1:
            index = np.arange(runs["first"][0], runs["end"][0], dtype=np.int32)
        else:
            spans = [np.arange(one["first"], one["end"], dtype=np.int32) for one in runs]
            index = _concatenated(spans)
        return Segment(
            ids=columns.ids[ids_begin:ids_end],
            parent=parent,
            start=start,
            index=index,
            weight=np.repeat(runs["weight"], lengths),
            message=np.repeat(runs["message"], lengths),
        )


class StoreWriter:
    """Appends packed documents to a store, in memory or in the files of a folder.

    Raises OSError where the folder can't be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._names: dict[str, int] = {}
        self._totals = dict.fromkeys(TYPES, 0)
        self._parts: dict[str, list[Any]] = {name: [] for name in TYPES}
        self._files: dict[str, BinaryIO] = {}
        if folder is not None:
            self._files = {name: (folder / f"{name}.bin").open("wb") for name in TYPES}

    def add(self, columns: Columns) -> None:
        """Append documents."""
        segments: Records = np.array(columns.segments)
        documents: Records = np.array(columns.documents)
        segments["ids"] += self._totals["ids"]
        segments["runs"] += self._totals["runs"]
        documents["segments"] += self._totals["segments"]
        numbers = [self._names.setdefault(name, len(self._names)) for name in columns.names]
        documents["source"] = np.array([*numbers, 0], np.int32)[documents["source"]]
        parts: dict[str, Records] = {
            "ids": columns.ids,
            "runs": columns.runs,
            "segments": segments,
            "documents": documents,
        }
        for name, part in parts.items():
            self._totals[name] += len(part)
            if self._folder is None:
                self._parts[name].append(part)
            else:
                self._files[name].write(part.tobytes())

    def finish(self) -> Columns:
        """The store of all documents. Files, if any, are closed and memory-mapped."""
        if self._folder is not None:
            self.close()
            return map_columns(self._folder, tuple(self._names))
        joined: dict[str, Any] = {
            name: np.concatenate([np.empty(0, kind), *self._parts[name]])
            for name, kind in TYPES.items()
        }
        return Columns(**joined, names=tuple(self._names))

    def close(self) -> None:
        """Close the files; no documents can be added after this."""
        for file in self._files.values():
            file.close()


def map_columns(folder: Path, names: Sequence[str]) -> Columns:
    """Memory-map the arrays of a folder, which reads only the pages that are used. Raises
    OSError.
    """
    arrays = {name: _mapped(folder / f"{name}.bin", kind) for name, kind in TYPES.items()}
    return Columns(**arrays, names=tuple(names))


def _mapped(path: Path, kind: np.dtype[Any]) -> Records:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return np.empty(0, kind)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), kind)


def source_numbers(documents: Sequence[Document]) -> tuple[tuple[str, ...], IntArray]:
    """The names of the sources, and for each document the index of its source."""
    if isinstance(documents, Counted):
        return documents.names, documents.sources
    names: dict[str, int] = {}
    numbers = [names.setdefault(one.origin.source, len(names)) for one in documents]
    return tuple(names), np.array(numbers, np.int32)


def token_counts(documents: Sequence[Document]) -> IntArray:
    """The number of tokens of each document; stored documents need not be built."""
    if isinstance(documents, Counted):
        return documents.tokens
    return np.array([document.tokens for document in documents], np.int32)


def target_counts(documents: Sequence[Document]) -> IntArray:
    """The number of targets of each document; stored documents need not be built."""
    if isinstance(documents, Counted):
        return documents.target_tokens
    return np.array([document.target_tokens for document in documents], np.int32)


def highest_id(documents: Sequence[Document]) -> tuple[int, Origin] | None:
    """The largest id in the documents and a row that has it; None where there is no document."""
    if isinstance(documents, Documents) and len(documents):
        return documents.highest_id()
    highest = [
        (max(int(segment.ids.max(initial=0)) for segment in one.segments), one.origin)
        for one in documents
    ]
    return max(highest, key=lambda pair: pair[0], default=None)


def longest_paths(documents: Sequence[Document]) -> IntArray:
    """The longest path of each document in tokens; stored documents need not be built."""
    if isinstance(documents, Counted):
        return documents.longest_paths
    return np.array([document.longest_path for document in documents], np.int32)
