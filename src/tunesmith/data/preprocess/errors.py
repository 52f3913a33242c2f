"""The errors that stop preprocessing: bad rows counted and shown, no known format, no documents
left.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.data.rendering.result import TOO_LONG
from tunesmith.data.row_errors import UNREAD, Fault
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
    faults: Sequence[tuple[Origin, Fault]],
    total: int,
    faults_file: Path | None,
    ledger: Ledger | None = None,
) -> DataError:
    """The error that counts bad rows by kind and shows some of each. Fields that nothing reads are
    counted one by one, as the ledger has them.
    """
    counts = Counter(fault.kind for _, fault in faults)
    by_kind = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    lines = [f"{len(faults)} of {total} rows can't be trained on: {by_kind}"]
    for kind, count in counts.most_common():
        lines.append(f"  {kind} ({count}):")
        if kind == UNREAD and ledger is not None:
            lines += _refused_fields(ledger)
            continue
        same = [(origin, fault) for origin, fault in faults if fault.kind == kind]
        lines += [f"    {origin}: {fault.message}" for origin, fault in same[:_SHOWN]]
        if advice := next((fault.hint for _, fault in same if fault.hint), None):
            lines.append(f"    mend it: {advice}")
    if faults_file is not None:
        lines.append(f"  all of them are listed in {faults_file}")
    ways: list[str] = []
    if UNREAD in counts:
        ways.append(
            "a field that looks like input or a wish is named in the recipe, as above; "
            "data.bad_rows=drop does not leave these rows out"
        )
    if set(counts) - {TOO_LONG, UNREAD}:
        ways.append("data.bad_rows=drop leaves the bad rows out")
    if TOO_LONG in counts:
        ways.append(
            "for rows that are too long: data.too_long=drop, truncate or split, or a larger "
            "data.max_length"
        )
    sources = {origin.source for origin, _ in faults}
    where = sources.pop() if len(sources) == 1 else "data.train"
    return DataError("\n".join(lines), where=where, hint="; ".join(ways))


def _refused_fields(ledger: Ledger) -> list[str]:
    lines: list[str] = []
    for source, fields in ledger.fields.items():
        for path, found in fields.items():
            if found.state == "refused":
                rows = ", ".join(f"{source}:{row}" for row in found.first)
                more = ", ..." if found.rows > len(found.first) else ""
                lines.append(f"    `{path}` holds something that nothing reads in {found.rows:,} "
                             f"row{'s' * (found.rows != 1)} ({rows}{more})")  # fmt: skip
                lines.append(f"      mend it: {found.hint}")
    return lines


def field_lines(ledger: Ledger) -> list[str]:
    """One line each for the fields that nothing reads, that were renamed, and that are ignored."""
    said: dict[str, dict[str, tuple[int, str]]] = {}
    for fields in ledger.fields.values():
        for path, found in fields.items():
            group = said.setdefault(found.state, {})
            group[path] = (group.get(path, (0, ""))[0] + found.rows, found.hint)
    lines: list[str] = []
    if unread := said.get("unread"):
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in unread))
        lines.append(f"data: not read: {_counted(unread)}; data.ignore_fields=[{names}] ignores it")
    if mapped := said.get("mapped"):
        pairs = [f"`{path}` as {hint} ({rows:,} rows)" for path, (rows, hint) in mapped.items()]
        lines.append(f"data: read under another name: {', '.join(pairs)}")
    if ignored := said.get("ignored"):
        lines.append(f"data: ignored: {_counted(ignored)}")
    return lines


def _counted(fields: Mapping[str, tuple[int, str]]) -> str:
    return ", ".join(f"`{path}` ({rows:,} rows)" for path, (rows, _) in fields.items())


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
