"""The registry of readers by file name, and the opening of compressed files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, cast

from tunesmith.data.sources.readers.columnar import arrow_rows, parquet_rows
from tunesmith.data.sources.readers.delimited import delimited_rows
from tunesmith.data.sources.readers.json import json_rows, lines_or_list
from tunesmith.data.sources.readers.rows import TIMES, Raw, check_expansion, lines_of
from tunesmith.errors import DataError

Reader = Callable[[Any, str], Iterator[Raw]]

_TEXTS: dict[str, Reader] = {
    ".jsonl": lambda file, name: lines_or_list(file, name, lines_of),
    ".ndjson": lambda file, name: lines_or_list(file, name, lines_of),
    ".json": json_rows,
    ".csv": lambda file, name: delimited_rows(lines_of(file, name), name, delimiter=","),
    ".tsv": lambda file, name: delimited_rows(lines_of(file, name), name, delimiter="\t"),
}
_TABLES: dict[str, Reader] = {".parquet": parquet_rows, ".arrow": arrow_rows}
_CODECS = {".gz": "gzip", ".zst": "zstd"}

MOST_TIMES = {"gzip": 500, "zstd": TIMES}
"""How many times its size a compressed file may have beyond `USUAL`; gzip looks back 32 KiB."""

READABLE = " ".join([*_TEXTS, *_TABLES]) + ", the first five also with .gz or .zst"
"""What can be read, for messages."""


def kind_of(name: str) -> str | None:
    """The ending that says how a file is read, less that of its compression; None: not readable."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes[-2:]]
    if suffixes and suffixes[-1] in _CODECS:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in _TEXTS else None
    return suffixes[-1] if suffixes and suffixes[-1] in {**_TEXTS, **_TABLES} else None


def file_rows(
    file: Any, name: str, file_name: str, columns: Mapping[str, str] | None = None
) -> Iterator[Raw]:
    """The rows of an open file, read as `file_name` says; `name` is what errors call it, `columns`
    are our names of columns to the file's.

    Raises:
        DataError: the file can't be read in this way, or its compression is damaged.
    """
    kind = kind_of(file_name)
    if kind is None:
        raise DataError(
            f"can't read {PurePath(file_name).suffix or 'no ending'}",
            where=name,
            hint=f"readable are {READABLE}",
        )
    readers = {**_TEXTS, **_TABLES}
    if columns:
        readers[".json"] = lambda file, name: json_rows(file, name, columns)
    codec = _CODECS.get(PurePath(file_name).suffix.lower())
    if codec is None:
        yield from readers[kind](file, name)
        return
    try:
        yield from readers[kind](_decompressed(file, codec, name), name)
    except (OSError, EOFError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise DataError(
            f"the compressed file is damaged or cut off: {reason}",
            where=name,
            hint=f"test it with `{'gzip' if codec == 'gzip' else 'zstd'} -t`",
        ) from error


def _decompressed(file: Any, codec: str, name: str) -> Any:
    return io.BufferedReader(_Expanded(file, codec, name), 1 << 20)


class _Expanded(io.RawIOBase):
    """The contents of a compressed file, as long as they are not out of all proportion to it."""

    def __init__(self, file: Any, codec: str, name: str) -> None:
        import pyarrow  # pyright: ignore[reportMissingTypeStubs]

        # The Python library reads gzip alone, and half as fast.
        self._stream = cast("Any", pyarrow).CompressedInputStream(file, codec)
        self._file = file
        self._times = MOST_TIMES[codec]
        self._name = name
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = int(self._stream.readinto(buffer))
        self._size += read
        check_expansion(self._size, self._file.tell(), self._name, times=self._times)
        return read
