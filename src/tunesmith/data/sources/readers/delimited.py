"""Reader of CSV and TSV with a header line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from typing import Any, cast

from tunesmith.data.row_errors import NOT_UTF8, Fault
from tunesmith.data.sources.readers import rows as raw
from tunesmith.data.sources.readers.columnar import refuse_doubled
from tunesmith.data.sources.readers.rows import LONG, LongRow, Raw, too_long

_LONGEST_FIELD = 2**31 - 1


_QUOTES = "fields with delimiters, newlines or quotes need quotes around them"


def delimited_rows(binary: Iterable[bytes], name: str, *, delimiter: str) -> Iterator[Raw]:
    """One row for each record after the header; all values are strings.

    Raises:
        DataError: a record is so long that the file is no data.
    """
    csv.field_size_limit(_LONGEST_FIELD)  # the default refuses texts over 128 KiB
    lines = (line.decode("utf-8", "surrogateescape") for line in binary)
    record = _Record(_without_mark(lines), name)
    reader = csv.reader(record, strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        record.begin(reader.line_num + 1)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield None, Fault("invalid-csv", f"line {reader.line_num}: {error}", _QUOTES)
            continue
        if cells is None:
            return
        if header is None:
            header = cells
            refuse_doubled(header, name)
        elif cells:
            yield _row(header, cells, reader.line_num, size=record.size)


def _row(header: list[str], cells: list[str], line: int, *, size: int) -> Raw:
    if len(cells) != len(header):
        message = f"line {line} ends a row of {len(cells)} fields; the header has {len(header)}"
        return None, Fault("invalid-csv", message, _QUOTES)
    values = dict(zip(header, cells, strict=True))
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        message = f"line {line} ends a row that is not UTF-8 text"
        return None, Fault("invalid-encoding", message, NOT_UTF8)
    row = cast("dict[str, Any]", values)
    return (LongRow(row) if size >= LONG else row), None


class _Record:
    """Lines, of which a record can have many: a quote that is never closed takes all the rest."""

    def __init__(self, lines: Iterator[str], name: str) -> None:
        self._lines = lines
        self._name = name
        self._first = 1
        self.size = 0  # characters since `begin`

    def begin(self, line: int) -> None:
        self._first, self.size = line, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.size += len(line)
        if self.size > raw.LONGEST:
            raise too_long(f"the row that begins on line {self._first}", self._name)
        return line


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line.removeprefix("\ufeff") if number == 0 else line
