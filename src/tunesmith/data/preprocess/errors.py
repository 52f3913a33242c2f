"""The errors that stop preprocessing: bad rows counted and shown, no known format, no documents
left.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.data.rendering.result import TOO_LONG
from tunesmith.data.row_errors import Fault
from tunesmith.data.sources.sources import Row, Source
from tunesmith.errors import DataError
from tunesmith.types import Origin

_SHOWN = 3


def write_faults(path: Path, faults: Sequence[tuple[Origin, Fault]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for origin, fault in faults:
            entry = {
                "source": origin.source,
                "row": origin.row,
                "kind": fault.kind,
                "message": fault.message,
                "hint": fault.hint,
            }
            file.write(json.dumps(entry) + "\n")


def refusal(
    faults: Sequence[tuple[Origin, Fault]], total: int, faults_file: Path | None
) -> DataError:
    """The error that counts bad rows by kind and shows some of each."""
    counts = Counter(fault.kind for _, fault in faults)
    by_kind = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    lines = [f"{len(faults)} of {total} rows can't be trained on: {by_kind}"]
    for kind, count in counts.most_common():
        lines.append(f"  {kind} ({count}):")
        same = [(origin, fault) for origin, fault in faults if fault.kind == kind]
        lines += [f"    {origin}: {fault.message}" for origin, fault in same[:_SHOWN]]
        if advice := next((fault.hint for _, fault in same if fault.hint), None):
            lines.append(f"    mend it: {advice}")
    if faults_file is not None:
        lines.append(f"  all of them are listed in {faults_file}")
    ways: list[str] = []
    if set(counts) - {TOO_LONG}:
        ways.append("data.bad_rows=drop leaves the bad rows out")
    if TOO_LONG in counts:
        ways.append(
            "for rows that are too long: data.too_long=drop, truncate or split, or a larger "
            "data.max_length"
        )
    sources = {origin.source for origin, _ in faults}
    where = sources.pop() if len(sources) == 1 else "data.train"
    return DataError("\n".join(lines), where=where, hint="; ".join(ways))


def unknown_format(source: Source, first: Row) -> DataError:
    columns = ", ".join(f"`{name}`" for name in first.values or {}) or "no columns"
    return DataError(
        f"no row has the columns of a known format; it has {columns}",
        where=source.name,
        hint="messages, conversations, prompt and completion, instruction and output, or text; "
        "other names: data.columns='{prompt: ..., completion: ...}'",
    )


def mostly_faults(faults: Sequence[tuple[Origin, Fault]], rows: int) -> DataError:
    """The error where so many of the first rows are bad that reading on is of no use."""
    origin, fault = faults[-1]
    return DataError(
        f"{len(faults):,} of the first {rows:,} rows can't be trained on, so the rest was not read;"
        f" the last is {origin}: {fault.message}",
        where=origin.source,
        hint=fault.hint or "check that the file has the format that its name says",
    )


def nothing_left(ledger: Ledger) -> DataError:
    counts = {
        f"{len(entry.rows)} {reason} ({name})": None
        for name, reasons in ledger.reasons.items()
        for reason, entry in reasons.items()
    }
    total = ledger.totals.rows
    return DataError(
        f"none of the {total} rows can be trained on: {', '.join(counts) or 'there are none'}",
        where=", ".join(ledger.sources) or "data.train",
        hint="look at some of them with `tunesmith preview`",
    )
