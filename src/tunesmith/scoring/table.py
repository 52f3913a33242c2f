"""Score files: Parquet with one line a row, and metadata of what was scored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError, RunError
from tunesmith.scoring.rows import RowScore

KEY = b"tunesmith.scores"
VERSION = 1
_TEXTS, _COUNTS = ("source", "status", "reason"), ("row", "target_tokens", "tokens")


@dataclass(frozen=True, slots=True)
class ScoredSource:
    """A data source as it was when it was scored."""

    sha256: str
    rows: int
    format: str | None
    columns: Mapping[str, str] | None  # ours: theirs


@dataclass(frozen=True, slots=True)
class Scores:
    """A score file as read. `numbers` are its numeric columns, NaN where a row has no value; they
    and `source` and `row` are of one length, in the file's order.
    """

    path: Path
    sources: Mapping[str, ScoredSource]
    about: Mapping[str, Any]  # model, template and settings
    source: Sequence[str]
    row: NDArray[np.int64]
    reason: Sequence[str | None]
    numbers: Mapping[str, NDArray[np.float64]]


def write_scores(
    path: Path,
    scores: Iterable[RowScore],
    *,
    sources: Mapping[str, ScoredSource],
    about: Mapping[str, Any],
) -> None:
    """Write the file; it is whole or not there.

    Raises:
        RunError: it can't be written.
    """
    pa, parquet = _arrow()
    records = [asdict(score) for score in scores]
    kinds = [(name, _kind(pa, name)) for name in RowScore.__slots__]
    held = {"version": VERSION, "sources": {n: asdict(s) for n, s in sources.items()}, **about}
    schema = pa.schema(kinds, metadata={KEY: json.dumps(held, ensure_ascii=False)})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        parquet.write_table(pa.Table.from_pylist(records, schema=schema), temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"can't be written: {error.strerror or error}", where=str(path)) from error


def read_scores(path: Path) -> Scores:
    """The score file at `path`.

    Raises:
        DataError: it is missing, or no score file.
    """
    pa, parquet = _arrow()
    try:
        table = parquet.read_table(path)
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path)) from error
    except (pa.ArrowException, OSError) as error:
        raise _foreign(path) from error
    metadata: Mapping[bytes, bytes] = table.schema.metadata or {}
    if KEY not in metadata or not {"source", "row", "reason", "target_tokens", "loss"} <= set(
        table.column_names
    ):
        raise _foreign(path)
    about = json.loads(metadata[KEY])
    if about.pop("version", None) != VERSION:
        raise DataError(
            "is a score file of another version", where=str(path), hint="score the data again"
        )
    numbers = {
        field.name: _floats(table.column(field.name))
        for field in table.schema
        if field.name != "row"
        and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
    }
    return Scores(
        path=path,
        sources={name: ScoredSource(**values) for name, values in about.pop("sources").items()},
        about=about,
        source=table.column("source").to_pylist(),
        row=np.asarray(table.column("row").to_pylist(), np.int64),
        reason=table.column("reason").to_pylist(),
        numbers=numbers,
    )


def _foreign(path: Path) -> DataError:
    return DataError(
        "is not a score file", where=str(path), hint="`tunesmith score` writes them: --out FILE"
    )


def _floats(column: Any) -> NDArray[np.float64]:
    values = column.to_pylist()
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _kind(pa: Any, name: str) -> Any:
    if name in _TEXTS:
        return pa.string()
    return pa.int64() if name in _COUNTS else pa.float64()


def _arrow() -> tuple[Any, Any]:
    import pyarrow
    from pyarrow import parquet

    return cast("Any", pyarrow), cast("Any", parquet)
