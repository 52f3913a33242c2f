"""CSV and TSV: a header, then a row of fields each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import Any, cast

from tunesmith.data.faults import NOT_UTF8, Fault
from tunesmith.data.readers.raw import Raw

_LONGEST_FIELD = 2**31 - 1


_QUOTES = "fields with delimiters, newlines or quotes need quotes around them"


def delimited_rows(binary: Iterable[bytes], *, delimiter: str) -> Iterator[Raw]:
    """One row for each record after the header; all values are strings."""
    csv.field_size_limit(_LONGEST_FIELD)  # the default refuses texts over 128 KiB
    lines = (line.decode("utf-8", "surrogateescape") for line in binary)
    reader = csv.reader(_without_mark(lines), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield None, Fault("invalid-csv", f"line {reader.line_num}: {error}", _QUOTES)
            continue
        if cells is None:
            return
        if header is None:
            header = cells
        elif cells:
            yield _row(header, cells, reader.line_num)


def _row(header: list[str], cells: list[str], line: int) -> Raw:
    if len(cells) != len(header):
        message = f"line {line} ends a row of {len(cells)} fields; the header has {len(header)}"
        return None, Fault("invalid-csv", message, _QUOTES)
    values = dict(zip(header, cells, strict=True))
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        message = f"line {line} ends a row that is not UTF-8 text"
        return None, Fault("invalid-encoding", message, NOT_UTF8)
    return cast("dict[str, Any]", values), None


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line.removeprefix("\ufeff") if number == 0 else line
