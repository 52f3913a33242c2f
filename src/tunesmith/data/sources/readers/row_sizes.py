"""The memory that columns of a record batch take as Python objects, counted before any is made.

A column may hold in a few bytes what takes gigabytes as objects: a text that a dictionary repeats,
a list of a billion nulls, views that all show the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.sources.readers.rows import LONGEST
from tunesmith.errors import DataError

AT_ONCE = 1 << 26
"""Bytes that are turned into objects at a time, unless a single row has more."""
_ITEMS = 1 << 22
"""Items of lists that are counted at a time."""
_OBJECT = 64.0
_POINTER = 8.0

Sizes = NDArray[np.float64]


class _TooMany(Exception):
    """The lists have more items than are counted at a time."""


def small_batches(batch: Any, name: str, first: int) -> Iterator[tuple[Any, Sizes]]:
    """The batch in parts of which each may become objects at once, with the bytes of each row;
    `first` is the number of its first row.

    Raises:
        DataError: a row takes more than `LONGEST`, or a column is of a kind that isn't counted.
    """
    try:
        sizes = _rows(batch, name)
        size = float(sizes.sum())
    except _TooMany:
        sizes, size = np.zeros(0), float("inf")
    if size <= AT_ONCE or (batch.num_rows == 1 and size <= LONGEST):
        yield batch, sizes
        return
    if batch.num_rows == 1:
        raise DataError(
            f"the row is longer than {LONGEST >> 20} MiB",
            where=f"{name}:{first}",
            hint="a row this large is no data, and a small file can hold many of them; "
            "leave it out when the file is written",
        )
    half = batch.num_rows // 2
    yield from small_batches(batch.slice(0, half), name, first)
    yield from small_batches(batch.slice(half), name, first + half)


def _rows(batch: Any, name: str) -> Sizes:
    sizes = np.full(batch.num_rows, _OBJECT)
    for column, label in zip(batch.columns, batch.schema.names, strict=True):
        try:
            sizes += _sizes(column)
        except NotImplementedError as error:
            raise DataError(
                f"column {label!r} is of a type that can't be read: {error}",
                where=name,
                hint="write it as text, numbers, lists or structs",
            ) from error
    return sizes


def _sizes(array: Any) -> Sizes:
    """Bytes of each value of an Arrow array as a Python object, about."""
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    is_ = cast("Any", pyarrow).types
    kind = array.type
    if isinstance(kind, cast("Any", pyarrow).BaseExtensionType):
        return _sizes(array.storage)
    if is_.is_dictionary(kind):
        repeated = _sizes(array.dictionary)
        at = _plain(array.indices)
        return repeated[at] if len(repeated) else np.full(len(at), _POINTER)
    if is_.is_struct(kind):
        fields = [_sizes(array.field(number)) for number in range(kind.num_fields)]
        return np.full(len(array), _OBJECT) + sum(fields)
    if is_.is_run_end_encoded(kind):
        return _run_sizes(array)
    if is_.is_list_view(kind) or is_.is_large_list_view(kind):
        return _view_sizes(array)
    if hasattr(kind, "value_type") or is_.is_map(kind):
        return _list_sizes(array)
    if is_.is_union(kind):
        raise NotImplementedError(str(kind))
    return _OBJECT + _lengths(array)


def _lengths(array: Any) -> Sizes:
    """Bytes of texts; 0 for numbers and the like, an object each."""
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    pa, kind = cast("Any", pyarrow), array.type
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        words: NDArray[np.int32] = np.frombuffer(array.buffers()[1], np.int32)
        lengths = words[::4]  # the first of a view's four
        return lengths[array.offset : array.offset + len(array)].astype(np.float64)
    large = pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    if large or pa.types.is_string(kind) or pa.types.is_binary(kind):
        if not len(array):
            return np.zeros(0)
        offsets = np.frombuffer(array.buffers()[1], np.int64 if large else np.int32)
        return np.diff(offsets[array.offset : array.offset + len(array) + 1]).astype(np.float64)
    width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else 0
    return np.full(len(array), float(width))


def _list_sizes(array: Any) -> Sizes:
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]
    from pyarrow import compute  # pyright: ignore[reportMissingTypeStubs]

    types = cast("Any", pyarrow).types
    if types.is_map(array.type):
        return _map_sizes(array)
    lengths, inside = _plain(cast("Any", compute).list_value_length(array)), array.type.value_type
    counts = lengths.astype(np.float64)
    if types.is_null(inside):
        return _OBJECT + _POINTER * counts
    if types.is_primitive(inside):
        return _OBJECT + _OBJECT / 2 * counts
    if lengths.sum(dtype=np.float64) > _ITEMS:
        raise _TooMany
    return _OBJECT + _summed(_sizes(array.flatten()), np.concatenate([[0], np.cumsum(lengths)]))


def _map_sizes(array: Any) -> Sizes:
    """Pairs of a map, which become tuples."""
    if not len(array):
        return np.zeros(0)
    ends = _plain(array.offsets)
    first, count = int(ends[0]), int(ends[-1] - ends[0])
    if count > _ITEMS:
        raise _TooMany
    pairs = _sizes(array.keys.slice(first, count)) + _sizes(array.items.slice(first, count))
    return _OBJECT + _summed(pairs + _OBJECT, ends - first)


def _summed(items: Sizes, ends: NDArray[np.int64]) -> Sizes:
    """The sums between neighbouring places."""
    return np.diff(np.concatenate([[0.0], np.cumsum(items)])[ends])


def _view_sizes(array: Any) -> Sizes:
    """Lists that may show the same items; those out of sight are counted for nothing."""
    if len(array.values) > _ITEMS:
        raise NotImplementedError(f"{array.type} of {len(array.values):,} items")
    sums = np.concatenate([[0.0], np.cumsum(_sizes(array.values))])
    start, lengths = _plain(array.offsets), _plain(array.sizes)
    return _OBJECT + sums[start + lengths] - sums[start]


def _run_sizes(array: Any) -> Sizes:
    ends = _plain(array.run_ends)
    numbers = np.arange(array.offset, array.offset + len(array), dtype=np.int64)
    at = np.searchsorted(ends, numbers, side="right")
    return _sizes(array.values)[at]


def _plain(numbers: Any) -> NDArray[np.int64]:
    """Whole numbers without nulls, which become 0."""
    return numbers.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
