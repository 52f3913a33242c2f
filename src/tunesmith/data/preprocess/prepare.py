"""Preprocessing: rows are read and rendered to documents, all bad rows are collected, the ledger is
filled.

Every row is looked at before an error is raised, so that one error shows all that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.formats.detect import detect_format
from tunesmith.data.preprocess.cache import CacheEntry, DamagedEntry, cache_key, discard
from tunesmith.data.preprocess.document_store import Columns, Documents, StoreWriter
from tunesmith.data.preprocess.errors import (
    field_lines,
    mostly_faults,
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
from tunesmith.data.row_errors import Fault, Field
from tunesmith.data.sources.sources import Row, Source, content_hash, read_rows
from tunesmith.data.templates.template import Template
from tunesmith.errors import DataError
from tunesmith.types import Document, Origin

MOST_FAULTS = 1 << 20
"""Reading stops after this many bad rows if they are most of all rows."""
UNUSED = "after the last answer"

Keep = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class PreparedRow:
    """One row of the input, in input order. `result` is None where `keep` was false for the row.
    `fields` are those that reading it has renamed or taken out.
    """

    origin: Origin
    values: dict[str, Any] | None
    result: Rendered | Fault | None
    fields: tuple[Field, ...] = ()

    @property
    def all_fields(self) -> tuple[Field, ...]:
        """Those that were renamed or taken out, and those that nothing reads."""
        return self.fields + (self.result.fields if self.result is not None else ())


@dataclass(slots=True)
class Prepared:
    """The documents of some sources, and the outcome of all their rows."""

    documents: Sequence[Document]
    ledger: Ledger
    formats: dict[str, str]  # by source name
    sample_text: str  # the first document's first path, decoded
    faults: list[tuple[Origin, Fault]]
    content_hashes: dict[str, str] = field(default_factory=dict[str, str])  # by source name
    notes: list[str] = field(
        default_factory=list[str]
    )  # messages to the user about the preparation


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
    """Yield every row of the sources with its rendering; bad rows are values, not errors.

    `formats` is filled with the format of each source once it is read, which is that of its first
    row with a known format.

    Raises:
        DataError: a source as a whole can't be read.
    """
    encoder = Encoder(template)
    options = Options(train_on, max_length, too_long)
    for batch in in_batches(_tasks(sources, keep, formats if formats is not None else {})):
        tasks = [one for one in batch if isinstance(one, Task)]
        results = iter(render_batch(tasks, template, encoder, options))
        for one in batch:
            if isinstance(one, Task):
                yield PreparedRow(one.origin, one.values, next(results), one.fields)
            else:
                yield one


def _tasks(
    sources: Sequence[Source], keep: Keep | None, found: dict[str, str]
) -> Iterator[Task | PreparedRow]:
    """Yield every row in order: a task to render, or a row whose outcome is known already."""
    for source in sources:
        chosen = None if source.format == "auto" else source.format
        first: Row | None = None
        roles = frozenset(source.naming.roles.values())
        for row in read_rows(source):
            if row.values is None:
                yield PreparedRow(row.origin, None, row.fault)
                continue
            first = first or row
            chosen = chosen or detect_format(row.values)
            if keep is not None and not keep(row.values):
                yield PreparedRow(row.origin, row.values, None)
                continue
            yield Task(row.origin, row.values, chosen, source.format == "auto", row.fields, roles)
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
    """Prepare the documents of all rows for which `keep` is true.

    All bad rows are found first. With `bad_rows="error"` one DataError counts them by kind, shows
    three of each and names `faults_file`, which lists them all; with "drop" they are entered in the
    ledger. Rows over `max_length` with `too_long="error"` are refused in the same way.

    `cache` is a folder for prepared documents of files. Documents of rows in memory, or chosen by a
    `keep` other than a `Side`, are not cached. `processes` is the number of workers; None starts
    workers only for large data. Neither changes the documents.

    Raises:
        DataError: rows are bad or too long, or no row is left to train on.
    """
    options = Options(train_on, max_length, too_long)
    work = _Work(sources, template, options, keep, processes)
    entry = None if cache is None else _entry(cache, work)
    prepared = _fresh(work) if entry is None else _cached(entry, work)
    refused = [
        (origin, fault)
        for origin, fault in prepared.faults
        if fault.kind == TOO_LONG or fault.stops or bad_rows == "error"
    ]
    if refused:
        if faults_file is not None:
            write_faults(faults_file, refused)
        raise refusal(refused, prepared.ledger.totals.rows, faults_file, prepared.ledger)
    prepared.notes += field_lines(prepared.ledger)
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
    """Render all rows; the documents are written to the folder, if one is given."""
    ledger = Ledger()
    formats: dict[str, str] = {}
    faults: list[tuple[Origin, Fault]] = []
    notes: list[str] = []
    writer = StoreWriter(folder)
    # Rows in memory may be of classes that a worker process can't import.
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
                fields = [*(one.fields), *(outcome.fields if outcome is not None else ())]
                for field in fields:
                    ledger.note_field(one.origin, field)
                if outcome is not None and outcome.fault is not None:
                    faults.append((one.origin, outcome.fault))
            if len(faults) > MOST_FAULTS and 2 * len(faults) > ledger.totals.rows:
                raise mostly_faults(faults, ledger.totals.rows)
        documents = Documents(writer.finish())
    finally:
        writer.close()
    sample = _sample_text(documents[0], work.template) if documents else ""
    return Prepared(documents, ledger, formats, sample, faults, {}, notes)


def _hashes(sources: Sequence[Source]) -> dict[str, str]:
    return {source.name: content_hash(source) for source in sources}


def _entry(cache: Path, work: _Work) -> CacheEntry | None:
    """The cache entry of these documents; None where they can't be identified by a key."""
    side = work.keep.key if isinstance(work.keep, Side) else None
    if work.keep is not None and side is None:
        return None
    settings = {**asdict(work.options), "keep": side}
    try:
        key = cache_key(cache, work.sources, work.template, settings)
    except DataError:
        return None  # reading the rows will raise a better error
    return None if key is None else CacheEntry(cache, *key)


def _cached(entry: CacheEntry, work: _Work) -> Prepared:
    """The documents from the cache, or rendered into the cache, or in memory if it can't be
    used.
    """
    notes: list[str] = []
    try:
        found = entry.read()
        if found is not None:
            return _from_kept(*found, entry.hashes)
    except DamagedEntry as error:
        notes.append(f"data: the cache entry is damaged ({error}), so the data is prepared anew")
    aside: Path | None = None
    try:
        if notes:
            entry.remove()
        before = _stamps(work.sources)
        aside = entry.aside()
        prepared = _fresh(work, aside)
        # An entry without documents is of no use, and one of a file that changed meanwhile would be
        # wrong.
        if len(prepared.documents) and _stamps(work.sources) == before:
            entry.commit(aside, _names(prepared), _kept(prepared))
            aside = None
    except OSError as error:
        reason = error.strerror or str(error)
        prepared = _fresh(work)
        notes.append(f"data: not cached, because {entry.folder.parent} can't be written: {reason}")
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
    """Size and mtime of each file, which change when the file is written."""
    found = [source.path.stat() for source in sources if source.path is not None]
    return [(one.st_size, one.st_mtime_ns) for one in found]


def _kept(prepared: Prepared) -> dict[str, Any]:
    """All values but the documents, as plain values for the manifest."""
    return {
        "ledger": prepared.ledger.to_dict(),
        "formats": prepared.formats,
        "sample_text": prepared.sample_text,
        "faults": [
            [origin.source, origin.row, fault.kind, fault.message, fault.hint, fault.fields]
            for origin, fault in prepared.faults
        ],
    }


def _from_kept(columns: Columns, kept: Mapping[str, Any], hashes: Mapping[str, str]) -> Prepared:
    documents = Documents(columns)
    faults = [
        (
            Origin(source, row),
            Fault(kind, message, hint, tuple(Field(*field) for field in fields)),
        )
        for source, row, kind, message, hint, fields in kept["faults"]
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
    """Enter a row's outcome in the ledger, and the reason for all that is not trained on."""
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
    """The path from a root to the first leaf, decoded to text."""
    segments = document.segments
    at = next(n for n in range(len(segments)) if all(other.parent != n for other in segments))
    ids: list[int] = []
    while at >= 0:
        ids = [int(token) for token in segments[at].ids] + ids
        at = segments[at].parent
    return template.decode(ids)
