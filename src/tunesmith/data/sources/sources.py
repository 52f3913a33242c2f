"""Sources of rows: files and iterables, read as a stream of rows that know their origin."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunesmith.data.fields.normalize import PLAIN, Naming, normalize
from tunesmith.data.row_errors import Fault, Field
from tunesmith.data.sources.readers.memory import memory_rows
from tunesmith.data.sources.readers.registry import file_rows
from tunesmith.data.sources.readers.rows import LongRow, Raw
from tunesmith.errors import DataError
from tunesmith.types import Origin


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its values, or why it could not be read. `fields` says what was renamed or
    taken out.
    """

    origin: Origin
    values: dict[str, Any] | None
    fault: Fault | None = None
    fields: tuple[Field, ...] = ()


@dataclass(slots=True)
class Source:
    """A file (`path`) or an iterable of dicts (`rows`); exactly one of the two is given.

    `name` is what the user calls it and what errors and the ledger say. `columns` maps our names to
    the data's; `naming` holds roles and fields to ignore. `verbatim` leaves every row as written.
    `limit` keeps the first rows only. `section` is its place in the recipe's list, which the files
    of a folder share; `commit` that of the hub data set it is a file of. An iterator is kept as a
    list, since rows are read more than once; of a `DatasetDict` it is the split `train`, or the
    only one.
    """

    name: str
    path: Path | None = None
    rows: Iterable[Any] | None = None
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    naming: Naming = PLAIN
    verbatim: bool = False
    section: int = 0
    commit: str | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.rows is None):
            raise ValueError("a source has either a path or rows")
        given: Any = self.rows
        if isinstance(given, Mapping):
            splits = cast("Mapping[str, Any]", given)
            split = _split(splits)
            if split is None:
                raise DataError(
                    f"the rows are one mapping with the keys {_names(list(splits))}",
                    where=self.name,
                    hint="give an iterable of dicts, such as one split: data['train']",
                )
            self.name, self.rows = f"{self.name}/{split}", cast("Iterable[Any]", splits[split])
        rows = self.rows
        if isinstance(rows, Iterator):
            self.rows = list(rows)


def _split(splits: Mapping[str, Any]) -> str | None:
    """The split of a `DatasetDict` to read; None for any other mapping."""
    if not splits or not all(hasattr(one, "column_names") for one in splits.values()):
        return None
    return "train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else None


def resolve_path(path: str | Path, fallback: Path | None = None) -> Path:
    """The path from the current folder; where nothing is there, from `fallback`.

    If the file is in neither, the first is returned and reading it says so.
    """
    here = Path(path).expanduser()
    if here.is_absolute() or fallback is None or here.exists():
        return here
    beside = fallback / here
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
        renamed = rename_columns(values, source.columns)
        if source.verbatim:
            yield Row(origin, renamed)
            continue
        read, fields = normalize(renamed, source.naming)
        yield Row(origin, read, None, fields)
    if count == 0:
        raise DataError("there are no rows", where=source.name, hint="the file must hold data")


def rename_columns(values: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The values under our names; columns that are not mentioned keep theirs."""
    if not columns:
        return values
    taken = set(columns.values())
    renamed = {name: value for name, value in values.items() if name not in taken}
    renamed.update({our: values[name] for our, name in columns.items() if name in values})
    return LongRow(renamed) if isinstance(values, LongRow) else renamed


def content_hash(source: Source) -> str:
    """sha256 in hex: of a file's bytes, or of an iterable's rows as canonical JSON Lines."""
    digest = hashlib.sha256()
    if source.path is not None:
        with _opened(source) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    for values, _ in memory_rows(source.rows, source.name):
        digest.update(canonical_json(values) + b"\n")
    return digest.hexdigest()


def canonical_json(values: Any) -> bytes:
    """JSON in one spelling: keys sorted, no spaces, ASCII; values that JSON lacks as their text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), default=str).encode()


def _raw_rows(source: Source) -> Iterator[Raw]:
    if source.path is None:
        yield from memory_rows(source.rows, source.name)
        return
    if source.path.is_dir():
        raise DataError(
            "this is a folder", where=source.name, hint=f"name its files: {source.name}/*"
        )
    with _opened(source) as file:
        yield from file_rows(file, source.name, source.path.name, source.columns)


def _opened(source: Source) -> Any:
    path = cast("Path", source.path)
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise DataError("no such file", where=source.name, hint=_missing_hint(path)) from error
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "give a file that you may read"
        raise DataError(f"can't be opened: {reason}", where=source.name, hint=hint) from error


def _missing_hint(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either; the current folder is {Path.cwd()}"
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(str(folder / name) for name in close)}?"
    return f"the current folder is {Path.cwd()}"


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
