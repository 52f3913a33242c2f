"""Parquet and Arrow IPC, in its file and its stream form: a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from tunesmith.data.readers.raw import BATCH_ROWS, Raw
from tunesmith.errors import DataError

_ARROW_FILE = b"ARROW1"


def parquet_rows(file: Any, name: str) -> Iterator[Raw]:
    """The rows of a Parquet file.

    Raises:
        DataError: it is none, or it is damaged.
    """
    from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]

    def batches() -> Iterator[Any]:
        table = cast("Any", parquet).ParquetFile(file)
        # Asked for all row groups at once it keeps what it has read of each.
        for group in range(table.num_row_groups):
            yield from table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group])

    return _rows(batches(), name, "Parquet")


def arrow_rows(file: Any, name: str) -> Iterator[Raw]:
    """The rows of an Arrow IPC file or stream; `datasets` keeps its tables as streams.

    Raises:
        DataError: it is neither, or it is damaged.
    """
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    def batches() -> Iterator[Any]:
        ipc = cast("Any", pyarrow).ipc
        indexed = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if not indexed:
            yield from ipc.open_stream(file)
            return
        table = ipc.open_file(file)
        for number in range(table.num_record_batches):
            yield table.get_batch(number)

    return _rows(batches(), name, "Arrow")


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


def _rows(batches: Iterator[Any], name: str, kind: str) -> Iterator[Raw]:
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]

    try:
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                for values in batch.slice(start, BATCH_ROWS).to_pylist():
                    yield without_filled(values), None
    except (cast("Any", pyarrow).ArrowException, OSError) as error:
        message = (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(
            f"not readable as {kind}: {message}",
            where=name,
            hint="the file may be cut off or be of another kind; get it anew",
        ) from error
