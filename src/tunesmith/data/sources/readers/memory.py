"""Rows in memory: iterables of dicts, pandas DataFrames, Arrow tables, and data sets of `datasets`
in any output format.

Cells of numpy and torch become Python values, so that a row is what JSON would hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from tunesmith.data.row_errors import Fault
from tunesmith.data.sources.readers.columnar import refuse_doubled, table_rows, without_filled
from tunesmith.data.sources.readers.rows import Raw

_PLAIN = frozenset({str, int, float, bool, type(None)})


def memory_rows(rows: Any, name: str) -> Iterator[Raw]:
    """The rows of a Python object.

    Raises:
        DataError: two columns have the same name.
    """
    library = type(rows).__module__.split(".")[0]
    if library == "pandas" and hasattr(rows, "columns"):
        yield from _data_frame(rows, name)
        return
    if library == "pyarrow" and hasattr(rows, "to_batches"):
        for values in table_rows(rows, name):
            yield values, None
        return
    columnar = hasattr(rows, "column_names")  # a data set of `datasets`
    if columnar and hasattr(rows, "with_format"):
        rows = rows.with_format(None)  # its rows as Python objects, whatever it gives a model
    for values in cast("Iterable[Any]", rows):
        if isinstance(values, Mapping):
            row = {key: plain(one) for key, one in cast("Mapping[str, Any]", values).items()}
            yield (without_filled(row) if columnar else row), None
        else:
            message = f"the row is of Python type {type(values).__name__}, not a mapping"
            yield None, Fault("wrong-type", message, "a row is a dict of columns")


def _data_frame(frame: Any, name: str) -> Iterator[Raw]:
    """The rows of a DataFrame; what pandas counts as missing is null."""
    names = [str(one) for one in frame.columns]
    refuse_doubled(names, name)
    columns = [frame.iloc[:, number] for number in range(len(names))]
    missing = [column.isna().tolist() for column in columns]
    cells = [column.tolist() for column in columns]
    for number in range(len(frame)):
        yield (
            {
                label: None if gone[number] else plain(values[number])
                for label, values, gone in zip(names, cells, missing, strict=True)
            },
            None,
        )


def plain(value: Any) -> Any:
    """The value with numpy's and torch's arrays and numbers as Python's lists and numbers."""
    kind = cast("type[Any]", type(value))
    if kind in _PLAIN:
        return value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast("list[Any]", value)]
    if hasattr(value, "tolist") and kind.__module__.split(".")[0] in ("numpy", "torch"):
        return plain(value.tolist())
    return value
