"""Reader of Parquet and Arrow IPC (file and stream format) in small record batches."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tunesmith.data.sources.readers.row_sizes import small_batches
from tunesmith.data.sources.readers.rows import BATCH_ROWS, LONG, LongRow, Raw, check_expansion
from tunesmith.errors import DataError

_ARROW_FILE = b"ARROW1"
_BUFFER = 1 << 20
"""Bytes of a column that are read at a time, instead of a whole group's."""
LEAST_ROOM = 1 << 31
"""Bytes that decoding may take beyond the size of the file itself."""
_STATE, _MEMORY = Path("/proc/self/statm"), Path("/proc/meminfo")


def parquet_rows(file: Any, name: str) -> Iterator[Raw]:
    """The rows of a Parquet file.

    Raises:
        DataError: it is none, it is damaged, or it expands beyond all measure.
    """
    from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]

    def batches() -> Iterator[Any]:
        table = cast("Any", parquet).ParquetFile(file, buffer_size=_BUFFER)
        # Asked for all row groups at once it keeps what it has read of each.
        for group in range(table.num_row_groups):
            yield from table.iter_batches(
                batch_size=BATCH_ROWS, row_groups=[group], use_threads=False
            )

    return _rows(batches(), file, name, kind="Parquet")


def arrow_rows(file: Any, name: str) -> Iterator[Raw]:
    """The rows of an Arrow IPC file or stream; `datasets` keeps its tables as streams.

    Raises:
        DataError: it is neither, it is damaged, or it expands beyond all measure.
    """
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    def batches() -> Iterator[Any]:
        ipc = cast("Any", pyarrow).ipc
        indexed = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if not indexed:
            for batch in ipc.open_stream(file):
                yield _valid(batch)
            return
        table = ipc.open_file(file)
        for number in range(table.num_record_batches):
            yield _valid(table.get_batch(number))

    return _rows(batches(), file, name, kind="Arrow")


def _valid(batch: Any) -> Any:
    """The batch, whose places and lengths a file can state at will."""
    batch.validate(full=True)
    return batch


def _decoded(batches: Iterator[Any], size: int) -> Iterator[Any]:
    """The batches of a file of that size, each read with a limit on memory."""
    while True:
        with address_space_limit(size):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def without_filled(values: dict[str, Any]) -> dict[str, Any]:
    """The row without the nulls that a columnar file puts into its objects.

    Arrow gives all objects of a column the same keys and fills those that one lacks with null, so a
    tool's schema comes back with the keys of every other tool. Inside columns, a key that holds
    null is therefore taken as absent; nulls in lists, and whole columns, stay.
    """
    return {name: _unfilled(value) for name, value in values.items()}


def _unfilled(value: Any) -> Any:
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return {key: _unfilled(item) for key, item in items if item is not None}
    if isinstance(value, list):
        return [_unfilled(item) for item in cast("list[Any]", value)]
    return value


def _parts(batches: Iterator[Any], file: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The batches in parts that may be turned into objects, with the size of each row."""
    size = os.fstat(file.fileno()).st_size
    number, expanded = 0, 0.0
    for batch in _decoded(batches, size):
        refuse_doubled(batch.schema.names, name)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for part, sizes in small_batches(batch.slice(start, BATCH_ROWS), name, number):
                expanded += sizes.sum()
                check_expansion(int(expanded), size, name)
                yield part, sizes
                number += part.num_rows


def _objects(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch as Python objects; values of the type arrow.json as what they stand for.

    `datasets` stores columns of mixed types as such JSON.
    """
    rows = cast("list[dict[str, Any]]", batch.to_pylist())
    json_columns = [field for field in batch.schema if _has_json(field.type)]
    for field in json_columns:
        for row in rows:
            row[field.name] = _parsed(row[field.name], field.type)
    return rows


def _has_json(kind: Any) -> bool:
    """True if the Arrow type is arrow.json, or a list, map or struct with it inside."""
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    types = cast("Any", pyarrow).types
    if _is_json(kind):
        return True
    if types.is_struct(kind) or types.is_map(kind):
        return any(_has_json(kind.field(number).type) for number in range(kind.num_fields))
    return hasattr(kind, "value_type") and _has_json(kind.value_type)


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _parsed(value: Any, kind: Any) -> Any:
    """The Python value of this Arrow type, with the JSON in it parsed."""
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    types = cast("Any", pyarrow).types
    if value is None or not _has_json(kind):
        return value
    if _is_json(kind):
        return json.loads(value)
    if types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return {field.name: _parsed(value[field.name], field.type) for field in fields}
    if types.is_map(kind):
        return [(_parsed(k, kind.key_type), _parsed(v, kind.item_type)) for k, v in value]
    return [_parsed(item, kind.value_type) for item in value]


def table_rows(table: Any, name: str) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table in memory."""
    refuse_doubled(table.schema.names, name)
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        yield from (without_filled(values) for values in _objects(batch))


def refuse_doubled(names: Sequence[str], where: str) -> None:
    """Raises DataError if two columns have the same name, of which one would be lost."""
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise DataError(
            f"the column `{doubled[0]}` is there {names.count(doubled[0])} times",
            where=where,
            hint="give each column a name of its own when the file is written",
        )


def _rows(batches: Iterator[Any], file: Any, name: str, *, kind: str) -> Iterator[Raw]:
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    number = 0
    try:
        for part, sizes in _parts(batches, file, name):
            for values, size in zip(_objects(part), sizes, strict=True):
                row = without_filled(values)
                yield (LongRow(row) if size >= LONG else row), None
            number += part.num_rows
    except MemoryError as error:
        raise DataError(
            f"reading it from row {number} on takes more memory than there is for it",
            where=name,
            hint=f"a {kind} file can state much in few bytes; write it with fewer or smaller rows "
            "in a group, or as JSON Lines",
        ) from error
    except (cast("Any", pyarrow).ArrowException, OSError, json.JSONDecodeError) as error:
        message = (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(
            f"not readable as {kind}: {message}",
            where=name,
            hint="the file may be cut off or be of another kind; get it anew",
        ) from error


@contextmanager
def address_space_limit(size: int) -> Generator[None, None, None]:
    """Inside, what would take the process more than `LEAST_ROOM` and `size` bytes beyond what it
    has, or most of what the machine has left, ends in a MemoryError.

    It is a limit on the address space, and nothing where the system can't say how much that is.
    Other threads have the same limit meanwhile, so it is for moments.
    """
    used = _used()
    if used is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + min(LEAST_ROOM + size, _available() * 3 // 4)
    lowest = min([wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _used() -> int | None:
    """Address space of this process in bytes."""
    try:
        import resource

        return int(_STATE.read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None


def _available() -> int:
    """Bytes of memory that could be had."""
    for line in _MEMORY.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return LEAST_ROOM
