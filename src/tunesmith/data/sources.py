"""Where rows come from: files and iterables, read as a stream of rows that know their origin."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunesmith.data.faults import Fault
from tunesmith.errors import DataError
from tunesmith.types import Origin

_BATCH_ROWS = 1024
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its values, or why it could not be read."""

    origin: Origin
    values: dict[str, Any] | None
    fault: Fault | None = None


@dataclass(slots=True)
class Source:
    """A file (`path`) or an iterable of dicts (`rows`); exactly one of the two is given.

    `name` is what the user calls it and what errors and the ledger say. `columns` maps our names to
    the data's. `limit` keeps the first rows only. An iterator is kept as a list, since the hold-out
    reads rows twice.
    """

    name: str
    path: Path | None = None
    rows: Iterable[Any] | None = None
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.rows is None):
            raise ValueError("a source has either a path or rows")
        given: Iterable[Any] = () if self.rows is None else self.rows
        if isinstance(self.rows, Mapping):
            raise DataError(
                f"the rows are one mapping with the keys {_names(list(given))}",
                where=self.name,
                hint="give an iterable of dicts, such as one split: data['train']",
            )
        if isinstance(self.rows, Iterator):
            self.rows = list(self.rows)


def resolve_path(path: str | Path, recipe_folder: Path | None = None) -> Path:
    """The path from the current folder; where nothing is there, from the recipe's own folder.

    If the file is in neither, the first is returned and reading it says so.
    """
    here = Path(path).expanduser()
    if here.is_absolute() or recipe_folder is None or here.exists():
        return here
    beside = recipe_folder / here
    return beside if beside.exists() else here


def read_rows(source: Source) -> Iterator[Row]:
    """Every row of the source in order, with its columns renamed.

    A row that can't be read is a Row with a fault. Raises DataError where the source as a whole is
    missing, empty, of an unknown kind, or lacks a column that `columns` names.
    """
    count = 0
    checked = not source.columns
    for values, fault in _raw_rows(source):
        if source.limit is not None and count >= source.limit:
            return
        origin = Origin(source.name, count)
        count += 1
        if values is None:
            yield Row(origin, None, fault)
            continue
        if not checked:
            _check_columns(source, values)
            checked = True
        yield Row(origin, rename_columns(values, source.columns))
    if count == 0:
        raise DataError("there are no rows", where=source.name, hint="the file must hold data")


def rename_columns(values: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The values under our names; columns that are not mentioned keep theirs."""
    if not columns:
        return values
    taken = set(columns.values())
    renamed = {name: value for name, value in values.items() if name not in taken}
    renamed.update({our: values[name] for our, name in columns.items() if name in values})
    return renamed


def content_hash(source: Source) -> str:
    """sha256 in hex: of a file's bytes, or of an iterable's rows as canonical JSON Lines."""
    digest = hashlib.sha256()
    if source.path is not None:
        with _opened(source) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    for values in source.rows or ():
        digest.update(canonical_json(values) + b"\n")
    return digest.hexdigest()


def canonical_json(values: Any) -> bytes:
    """JSON in one spelling: keys sorted, no spaces, ASCII; values that JSON lacks as their text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), default=str).encode()


_Raw = tuple["dict[str, Any] | None", "Fault | None"]


def _raw_rows(source: Source) -> Iterator[_Raw]:
    if source.path is None:
        return _iterable_rows(source)
    readers = {
        ".jsonl": _jsonl_rows,
        ".ndjson": _jsonl_rows,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".parquet": _parquet_rows,
    }
    reader = readers.get(source.path.suffix.lower())
    if source.path.is_dir():
        raise DataError("this is a folder", where=source.name, hint=_folder_hint(source.path))
    if reader is None and source.path.exists():
        kinds = " ".join(readers)
        ending = source.path.suffix or "no ending"
        raise DataError(f"can't read {ending}", where=source.name, hint=f"readable are {kinds}")
    return (reader or _jsonl_rows)(source)


def _iterable_rows(source: Source) -> Iterator[_Raw]:
    for values in source.rows or ():
        if isinstance(values, Mapping):
            yield dict(cast("Mapping[str, Any]", values)), None
        else:
            kind = type(values).__name__
            yield None, Fault("wrong-type", f"the row is of Python type {kind}, not a mapping")


def _jsonl_rows(source: Source) -> Iterator[_Raw]:
    with _opened(source) as file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if content.strip():
                yield _parse_line(content, number)


def _parse_line(line: bytes, number: int) -> _Raw:
    place = f"line {number}"
    try:
        text = line.decode()
        values = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair is valid JSON, yet no tokenizer can take it.
            json.dumps(values, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return None, Fault("invalid-encoding", f"{place} is not UTF-8 text ({error.reason})")
    except json.JSONDecodeError as error:
        message = f"{place} is not JSON: {error.msg} at character {error.pos + 1}"
        return None, Fault("invalid-json", message)
    except (ValueError, RecursionError) as error:
        return None, Fault("invalid-json", f"{place} is not JSON: {error}")
    return _object(values, place)


def _object(values: Any, place: str) -> _Raw:
    if isinstance(values, dict):
        return cast("dict[str, Any]", values), None
    words = {"list": "a list", "str": "a string", "bool": "true or false", "NoneType": "null"}
    kind = words.get(type(values).__name__, "a number")
    return None, Fault("invalid-json", f"{place} is {kind}, not an object")


def _json_rows(source: Source) -> Iterator[_Raw]:
    with _opened(source) as file:
        content = file.read()
    if not content.strip():
        return
    try:
        parsed = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error.reason}", where=source.name) from error
    except json.JSONDecodeError as error:
        hint = "one object a line is JSON Lines: name the file .jsonl"
        raise DataError(
            f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}",
            where=source.name,
            hint=hint if error.msg == "Extra data" else None,
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", where=source.name) from error
    for number, values in enumerate(_row_list(parsed, source)):
        yield _object(values, f"item {number}")


def _row_list(parsed: Any, source: Source) -> list[Any]:
    """The list of rows: the whole file, or the only list in its top-level object."""
    if isinstance(parsed, list):
        return cast("list[Any]", parsed)
    fields = cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}
    lists = [cast("list[Any]", value) for value in fields.values() if isinstance(value, list)]
    if len(lists) != 1:
        raise DataError(
            f"not a list of objects, nor an object with one list ({len(lists)} lists found)",
            where=source.name,
            hint='write [{...}, {...}] or {"data": [{...}, {...}]}',
        )
    return lists[0]


def _csv_rows(source: Source) -> Iterator[_Raw]:
    csv.field_size_limit(_LONGEST_FIELD)  # the default refuses texts over 128 KiB
    with _opened(source) as binary:
        lines = (line.decode("utf-8", "surrogateescape") for line in binary)
        reader = csv.reader(_without_mark(lines), strict=True)
        header: list[str] | None = None
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield None, Fault("invalid-csv", f"line {reader.line_num}: {error}")
                continue
            if cells is None:
                return
            if header is None:
                header = cells
            elif cells:
                yield _csv_row(header, cells, reader.line_num)


def _csv_row(header: list[str], cells: list[str], line: int) -> _Raw:
    if len(cells) != len(header):
        message = f"line {line} ends a row of {len(cells)} fields; the header has {len(header)}"
        return None, Fault("invalid-csv", message, "fields with commas or newlines need quotes")
    values = dict(zip(header, cells, strict=True))
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return None, Fault("invalid-encoding", f"line {line} ends a row that is not UTF-8 text")
    return cast("dict[str, Any]", values), None


def _without_mark(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line.removeprefix("\ufeff") if number == 0 else line


def _parquet_rows(source: Source) -> Iterator[_Raw]:
    import pyarrow  # pyright: ignore[reportMissingTypeStubs]
    from pyarrow import parquet  # pyright: ignore[reportMissingTypeStubs]

    arrow, parquet_files = cast("Any", pyarrow), cast("Any", parquet)

    with _opened(source) as file:
        try:
            table = parquet_files.ParquetFile(file)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for values in batch.to_pylist():
                    yield values, None
        except (arrow.ArrowException, OSError) as error:
            message = str(error).splitlines()[0]
            raise DataError(f"not readable as Parquet: {message}", where=source.name) from error


def _opened(source: Source) -> Any:
    path = cast("Path", source.path)
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise DataError("no such file", where=source.name, hint=_missing_hint(path)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"can't be opened: {reason}", where=source.name) from error


def _missing_hint(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either; the current folder is {Path.cwd()}"
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(str(folder / name) for name in close)}?"
    return f"the current folder is {Path.cwd()}"


def _folder_hint(path: Path) -> str:
    endings = {".jsonl", ".ndjson", ".json", ".csv", ".parquet"}
    files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in endings)
    shown = ", ".join(str(file) for file in files[:3])
    return f"name its files: {shown}" if files else "name a file; none in it is readable as rows"


def _check_columns(source: Source, values: Mapping[str, Any]) -> None:
    missing = [name for name in (source.columns or {}).values() if name not in values]
    if not missing:
        return
    close = difflib.get_close_matches(missing[0], list(values), n=1)
    raise DataError(
        f"no column {_names(missing)}; the data has {_names(list(values))}",
        where=source.name,
        hint=f"did you mean {close[0]}?" if close else "columns are given as {ours: theirs}",
    )


def _names(names: list[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)
