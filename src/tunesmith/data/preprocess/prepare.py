"""Preprocessing of rows to documents: read, render, collect every bad row, fill the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.formats.detect import detect_format
from tunesmith.data.preprocess.cache import CacheEntry, DamagedEntry, cache_key, discard
from tunesmith.data.preprocess.document_store import Columns, Documents, StoreWriter
from tunesmith.data.preprocess.errors import (
    hardly_data,
    nothing_left,
    refusal,
    unknown_format,
    write_faults,
)
from tunesmith.data.preprocess.holdout import Side
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.data.preprocess.render_batch import (
    Options,
    Outcome,
    Task,
    in_batches,
    outcome_of,
    render_batch,
)
from tunesmith.data.preprocess.workers import pack_batches
from tunesmith.data.rendering.result import TOO_LONG, Rendered
from tunesmith.data.rendering.tokenize import Encoder
from tunesmith.data.row_errors import Fault
from tunesmith.data.sources.sources import Row, Source, content_hash, read_rows
from tunesmith.data.templates.template import Template
from tunesmith.errors import DataError
from tunesmith.types import Document, Origin

MOST_FAULTS = 1 << 20
"""Bad rows after which reading ends if they are most of all rows."""
UNUSED = "after the last answer"

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

    documents: Sequence[Document]
    ledger: Ledger
    formats: dict[str, str]  # by source name
    sample_text: str  # the first document's first path, decoded
    faults: list[tuple[Origin, Fault]]
    content_hashes: dict[str, str] = field(default_factory=dict[str, str])  # by source name
    notes: list[str] = field(default_factory=list[str])  # for the user, how it was prepared


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
            raise unknown_format(source, first)


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
    cache: Path | None = None,
    processes: int | None = 1,
) -> Prepared:
    """The documents of all rows for which `keep` is true.

    All bad rows are found first. Under `bad_rows="error"` one DataError counts them by kind, shows
    three of each and names `faults_file`, which lists them all; under "drop" they are in the
    ledger. Over-long rows under `too_long="error"` are refused in the same way. Raises DataError
    as well where no row is left to train on.

    `cache` is a folder in which documents from files are kept and looked for; those of rows in
    memory, or chosen by a `keep` other than a `Side`, are not. `processes`: how many render, None
    for more than one only where the data is large. Neither changes what is prepared.
    """
    options = Options(train_on, max_length, too_long)
    work = _Work(sources, template, options, keep, processes)
    entry = None if cache is None else _entry(cache, work)
    prepared = _fresh(work) if entry is None else _cached(entry, work)
    refused = [
        (origin, fault)
        for origin, fault in prepared.faults
        if fault.kind == TOO_LONG or bad_rows == "error"
    ]
    if refused:
        if faults_file is not None:
            write_faults(faults_file, refused)
        raise refusal(refused, prepared.ledger.totals.rows, faults_file)
    prepared.ledger.check()
    if not prepared.documents:
        raise nothing_left(prepared.ledger)
    if not prepared.content_hashes:
        prepared.content_hashes = _hashes(sources)
    return prepared


@dataclass(frozen=True, slots=True)
class _Work:
    sources: Sequence[Source]
    template: Template
    options: Options
    keep: Keep | None
    processes: int | None


def _fresh(work: _Work, folder: Path | None = None) -> Prepared:
    """Everything rendered anew; the documents are written to the folder, if there is one."""
    ledger = Ledger()
    formats: dict[str, str] = {}
    faults: list[tuple[Origin, Fault]] = []
    notes: list[str] = []
    writer = StoreWriter(folder)
    # Rows in memory may be of classes that no other process knows.
    alone = any(source.path is None for source in work.sources)
    batches = in_batches(_tasks(work.sources, work.keep, formats))
    split = ((batch, [one for one in batch if isinstance(one, Task)]) for batch in batches)
    try:
        for batch, packed in pack_batches(
            split,
            work.template,
            work.options,
            processes=1 if alone else work.processes,
            note=notes.append,
        ):
            writer.add(packed.columns)
            outcomes = iter(packed.outcomes)
            for one in batch:
                known = one.result if isinstance(one, PreparedRow) else None
                outcome = next(outcomes) if isinstance(one, Task) else outcome_of(known)
                _record(ledger, one.origin, outcome)
                if outcome is not None and outcome.fault is not None:
                    faults.append((one.origin, outcome.fault))
            if len(faults) > MOST_FAULTS and 2 * len(faults) > ledger.totals.rows:
                raise hardly_data(faults, ledger.totals.rows)
        documents = Documents(writer.finish())
    finally:
        writer.close()
    sample = _sample_text(documents[0], work.template) if documents else ""
    return Prepared(documents, ledger, formats, sample, faults, {}, notes)


def _hashes(sources: Sequence[Source]) -> dict[str, str]:
    return {source.name: content_hash(source) for source in sources}


def _entry(cache: Path, work: _Work) -> CacheEntry | None:
    """Where these documents are, or would be; None where they can't be known again."""
    side = work.keep.key if isinstance(work.keep, Side) else None
    if work.keep is not None and side is None:
        return None
    settings = {**asdict(work.options), "keep": side}
    try:
        key = cache_key(cache, work.sources, work.template, settings)
    except DataError:
        return None  # reading the rows says better what is wrong with the source
    return None if key is None else CacheEntry(cache, *key)


def _cached(entry: CacheEntry, work: _Work) -> Prepared:
    """The documents from the cache, or rendered into it, or in memory if it can't be used."""
    notes: list[str] = []
    try:
        found = entry.read()
        if found is not None:
            return _from_kept(*found, entry.hashes)
    except DamagedEntry as error:
        notes.append(f"data: the cache is damaged ({error}), so it is made anew")
    aside: Path | None = None
    try:
        if notes:
            entry.remove()
        before = _stamps(work.sources)
        aside = entry.aside()
        prepared = _fresh(work, aside)
        # Not what nobody can train on, and not what changed while it was read.
        if len(prepared.documents) and _stamps(work.sources) == before:
            entry.commit(aside, _names(prepared), _kept(prepared))
            aside = None
    except OSError as error:
        reason = error.strerror or str(error)
        prepared = _fresh(work)
        notes.append(f"data: not cached, since {entry.folder.parent} can't be written: {reason}")
    finally:
        if aside is not None:
            discard(aside)
    prepared.notes[:0] = notes
    prepared.content_hashes = dict(entry.hashes)
    return prepared


def _names(prepared: Prepared) -> tuple[str, ...]:
    documents = prepared.documents
    assert isinstance(documents, Documents)
    return documents.names


def _stamps(sources: Sequence[Source]) -> list[tuple[int, int]]:
    """Size and time of each file, which change when it does."""
    found = [source.path.stat() for source in sources if source.path is not None]
    return [(one.st_size, one.st_mtime_ns) for one in found]


def _kept(prepared: Prepared) -> dict[str, Any]:
    """All but the documents, in plain values."""
    return {
        "ledger": prepared.ledger.to_dict(),
        "formats": prepared.formats,
        "sample_text": prepared.sample_text,
        "faults": [
            [origin.source, origin.row, fault.kind, fault.message, fault.hint]
            for origin, fault in prepared.faults
        ],
    }


def _from_kept(columns: Columns, kept: Mapping[str, Any], hashes: Mapping[str, str]) -> Prepared:
    documents = Documents(columns)
    faults = [
        (Origin(source, row), Fault(kind, message, hint))
        for source, row, kind, message, hint in kept["faults"]
    ]
    return Prepared(
        documents,
        Ledger.from_dict(kept["ledger"]),
        dict(kept["formats"]),
        kept["sample_text"],
        faults,
        dict(hashes),
        [f"data: {len(documents):,} documents from the cache"],
    )


def record_outcome(ledger: Ledger, origin: Origin, result: Rendered | Fault | None) -> None:
    """Enter a row's outcome and the reason of whatever is not trained on."""
    _record(ledger, origin, outcome_of(result))


def _record(ledger: Ledger, origin: Origin, outcome: Outcome | None) -> None:
    if outcome is None:
        ledger.add_held_out(origin)
    elif outcome.trained:
        ledger.add_trained(
            origin,
            tokens=outcome.tokens,
            targets=outcome.targets,
            context=outcome.context,
            unused=outcome.unused,
        )
        cut = outcome.tokens - outcome.targets - outcome.context - outcome.unused
        if cut:
            ledger.explain(origin, outcome.reason or TOO_LONG, tokens=cut)
        if outcome.unused:
            ledger.explain(origin, UNUSED, tokens=outcome.unused)
    else:
        detail = None if outcome.fault is None else outcome.fault.message
        ledger.add_dropped(origin, tokens=outcome.tokens)
        reason = outcome.reason or "nothing to train on"
        ledger.explain(origin, reason, tokens=outcome.tokens, detail=detail)


def _sample_text(document: Document, template: Template) -> str:
    """The path from a root to the first leaf, decoded."""
    segments = document.segments
    at = next(n for n in range(len(segments)) if all(other.parent != n for other in segments))
    ids: list[int] = []
    while at >= 0:
        ids = [int(token) for token in segments[at].ids] + ids
        at = segments[at].parent
    return template.decode(ids)
