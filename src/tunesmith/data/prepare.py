"""Rows to documents: drives reading and rendering, finds every bad row, and fills the ledger."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.batches import Options, Task, in_batches, render_batch
from tunesmith.data.conversation import detect_format
from tunesmith.data.encoding import Encoder
from tunesmith.data.faults import Fault
from tunesmith.data.ledger import Ledger
from tunesmith.data.render import TOO_LONG, Rendered
from tunesmith.data.sources import Row, Source, content_hash, read_rows
from tunesmith.data.template import Template
from tunesmith.errors import DataError
from tunesmith.types import Document, Origin

UNUSED = "after the last answer"
_SHOWN = 3

Keep = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """One row of the input, in input order. `result` is None where `keep` set the row aside."""

    origin: Origin
    values: dict[str, Any] | None
    result: Rendered | Fault | None


@dataclass(slots=True)
class Prepared:
    """The documents of some sources, and what became of all their rows."""

    documents: list[Document]
    ledger: Ledger
    formats: dict[str, str]  # by source name
    sample_text: str  # the first document's first path, decoded
    faults: list[tuple[Origin, Fault]]
    content_hashes: dict[str, str] = field(default_factory=dict[str, str])  # by source name


def iter_prepared(
    sources: Sequence[Source],
    template: Template,
    *,
    train_on: str | list[str] = "auto",
    max_length: int | None,
    too_long: str = "error",
    keep: Keep | None = None,
    formats: dict[str, str] | None = None,
) -> Iterator[PreparedRow]:
    """Every row of the sources with what rendering made of it; bad rows are values, not errors.

    `formats` is filled with the format of each source once it is read: that of its first row
    which has one. Raises DataError where a source as a whole can't be read.
    """
    encoder = Encoder(template)
    options = Options(train_on, max_length, too_long)
    for batch in in_batches(_tasks(sources, keep, formats if formats is not None else {})):
        tasks = [one for one in batch if isinstance(one, Task)]
        results = iter(render_batch(tasks, template, encoder, options))
        for one in batch:
            if isinstance(one, Task):
                yield PreparedRow(one.origin, one.values, next(results))
            else:
                yield one


def _tasks(
    sources: Sequence[Source], keep: Keep | None, found: dict[str, str]
) -> Iterator[Task | PreparedRow]:
    """Every row in order: one to render, or one whose outcome is known already."""
    for source in sources:
        chosen = None if source.format == "auto" else source.format
        first: Row | None = None
        for row in read_rows(source):
            if row.values is None:
                yield PreparedRow(row.origin, None, row.fault)
                continue
            first = first or row
            chosen = chosen or detect_format(row.values)
            if keep is not None and not keep(row.values):
                yield PreparedRow(row.origin, row.values, None)
                continue
            yield Task(row.origin, row.values, chosen, source.format == "auto")
        if chosen is not None:
            found[source.name] = chosen
        elif first is not None:
            raise _unknown_format(source, first)


def prepare(
    sources: Sequence[Source],
    template: Template,
    *,
    train_on: str | list[str] = "auto",
    max_length: int | None,
    too_long: str = "error",
    bad_rows: str = "error",
    faults_file: Path | None = None,
    keep: Keep | None = None,
) -> Prepared:
    """The documents of all rows for which `keep` is true.

    All bad rows are found first. Under `bad_rows="error"` one DataError counts them by kind, shows
    three of each and names `faults_file`, which lists them all; under "drop" they are in the
    ledger. Over-long rows under `too_long="error"` are refused in the same way. Raises DataError
    as well where no row is left to train on.
    """
    documents: list[Document] = []
    ledger = Ledger()
    formats: dict[str, str] = {}
    faults: list[tuple[Origin, Fault]] = []
    rows = iter_prepared(
        sources,
        template,
        train_on=train_on,
        max_length=max_length,
        too_long=too_long,
        keep=keep,
        formats=formats,
    )
    for row in rows:
        if isinstance(row.result, Fault):
            faults.append((row.origin, row.result))
        elif row.result is not None and row.result.document is not None:
            documents.append(row.result.document)
        record_outcome(ledger, row.origin, row.result)
    total = ledger.totals.rows
    refused = [
        (origin, fault) for origin, fault in faults if fault.kind == TOO_LONG or bad_rows == "error"
    ]
    if refused:
        if faults_file is not None:
            _write_faults(faults_file, refused)
        raise _refusal(refused, total, faults_file)
    ledger.check()
    if not documents:
        raise _nothing_left(ledger)
    hashes = {source.name: content_hash(source) for source in sources}
    sample = _sample_text(documents[0], template)
    return Prepared(documents, ledger, formats, sample, faults, hashes)


def record_outcome(ledger: Ledger, origin: Origin, result: Rendered | Fault | None) -> None:
    """Enter a row's outcome and the reason of whatever is not trained on."""
    if result is None:
        ledger.add_held_out(origin)
    elif isinstance(result, Fault):
        ledger.add_dropped(origin)
        ledger.explain(origin, result.kind, detail=result.message)
    elif result.document is None:
        ledger.add_dropped(origin, tokens=result.tokens)
        ledger.explain(origin, result.reason or "nothing to train on", tokens=result.tokens)
    else:
        document = result.document
        targets = document.target_tokens
        context = document.tokens - targets
        ledger.add_trained(
            origin, tokens=result.tokens, targets=targets, context=context, unused=result.unused
        )
        cut = result.tokens - document.tokens - result.unused
        if cut:
            ledger.explain(origin, result.reason or TOO_LONG, tokens=cut)
        if result.unused:
            ledger.explain(origin, UNUSED, tokens=result.unused)


def _write_faults(path: Path, faults: Sequence[tuple[Origin, Fault]]) -> None:
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


def _refusal(
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
        ways.append("data.bad_rows=drop goes on without the bad rows")
    if TOO_LONG in counts:
        ways.append(
            "data.too_long=drop, truncate or split, or a larger data.max_length, "
            "deals with the over-long ones"
        )
    return DataError("\n".join(lines), hint="; ".join(ways))


def _unknown_format(source: Source, first: Row) -> DataError:
    columns = ", ".join(f"`{name}`" for name in first.values or {}) or "no columns"
    return DataError(
        f"no row has messages, prompt and completion, or text; the columns are {columns}",
        where=source.name,
        hint="name the columns: data.columns='{prompt: ..., completion: ...}'",
    )


def _nothing_left(ledger: Ledger) -> DataError:
    counts = {
        f"{len(entry.rows)} {reason} ({name})": None
        for name, reasons in ledger.reasons.items()
        for reason, entry in reasons.items()
    }
    total = ledger.totals.rows
    return DataError(
        f"none of the {total} rows can be trained on: {', '.join(counts) or 'there are none'}",
        hint="look at some of them with `tunesmith preview`",
    )


def _sample_text(document: Document, template: Template) -> str:
    """The path from a root to the first leaf, decoded."""
    segments = document.segments
    at = next(n for n in range(len(segments)) if all(other.parent != n for other in segments))
    ids: list[int] = []
    while at >= 0:
        ids = [int(token) for token in segments[at].ids] + ids
        at = segments[at].parent
    return template.decode(ids)
