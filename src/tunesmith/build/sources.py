"""Data sources of the recipe: files found, held-out rows chosen, everything rendered and
counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.schema import DataSection, Holdout, SourceSection
from tunesmith.data.fields.normalize import Naming
from tunesmith.data.preprocess.holdout import HoldoutChoice, Side, holdout_split
from tunesmith.data.preprocess.prepare import Prepared, prepare
from tunesmith.data.sources.files import find, folder_files, is_pattern, pattern_files
from tunesmith.data.sources.hub import fetch, is_hub_id
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.data.templates.template import Template
from tunesmith.errors import DataError
from tunesmith.train.job import EvalSet

Rows = Iterable[Mapping[str, Any]]
Keep = Callable[[Mapping[str, Any]], bool]


def make_sources(
    sections: Sequence[SourceSection], data: DataSection, *, folders: Sequence[Path] = ()
) -> list[Source]:
    """A source for each file that the sections stand for, found from the current folder, else
    from one of `folders`, else on the hub.

    Raises:
        DataError: a section stands for no file, or a file is named by two sections of a mixture.
    """
    sources: list[Source] = []
    for number, section in enumerate(sections):
        commit, files = _files(section, folders)
        columns = section.columns if section.columns is not None else data.columns
        made = [
            Source(
                name=name,
                path=path,
                format=section.format,
                columns=columns,
                naming=_naming(section, data),
                limit=section.limit,
                section=number,
                commit=commit,
            )
            for name, path in files
        ]
        sources += made if section.limit is None else _limited(made, section.limit)
    if is_mixture(sections):
        _check_apart(sources)
    return sources


def is_mixture(sections: Sequence[SourceSection]) -> bool:
    """True if a section says how often or how much of it is learned from."""
    return any(section.weight is not None or section.epochs is not None for section in sections)


def _files(
    section: SourceSection, folders: Sequence[Path]
) -> tuple[str | None, list[tuple[str, Path]]]:
    """The files of a section with their names, and the commit if they are from the hub."""
    path = section.path
    found = find(path, folders)
    choice = {"subset": section.subset, "split": section.split}
    asked = [name for name in ("subset", "split", "revision") if getattr(section, name) is not None]
    near = bool(Path(path).parts[1:]) and Path(path).parent.is_dir()
    if not found.exists() and is_hub_id(path) and (asked or not near):
        hub = fetch(path, revision=section.revision, **choice)
        return hub.commit, hub.files
    if asked and (section.revision is not None or not found.is_dir()):
        raise DataError(
            f"{asked[-1]} is for data sets of the hub, this is on disk",
            where=path,
            hint=f"leave out {asked[-1]}",
        )
    if found.is_dir():
        return None, folder_files(path, found, **choice)
    if is_pattern(path, folders):
        return None, pattern_files(path, folders)
    return None, [(path, found)]


def _limited(sources: list[Source], limit: int) -> list[Source]:
    """The sources up to the one in which the limit of them all is reached."""
    if len(sources) == 1:
        return sources
    kept: list[Source] = []
    for source in sources:
        source.limit = limit
        kept.append(source)
        limit -= sum(1 for _ in read_rows(source))
        if limit <= 0:
            break
    return kept


def _check_apart(sources: Sequence[Source]) -> None:
    sections: dict[str, int] = {}
    for source in sources:
        if sections.setdefault(source.name, source.section) != source.section:
            raise DataError(
                "the file is part of two sources of the mixture",
                where=source.name,
                hint="give it once; its weight or epochs say how often it is seen",
            )


def memory_source(rows: Rows, data: DataSection, *, name: str) -> list[Source]:
    """Rows given as Python objects, under a name that errors and the ledger use."""
    return [Source(name=name, rows=rows, columns=data.columns, naming=_naming(None, data))]


def _naming(section: SourceSection | None, data: DataSection) -> Naming:
    """The words about names that hold for a source: its own, else the recipe's."""
    own = section or SourceSection(path="-")
    roles = own.roles if own.roles is not None else data.roles
    ignored = own.ignore_fields if own.ignore_fields is not None else data.ignore_fields
    return Naming(dict(roles or {}), tuple(sorted(set(ignored or ()))))


def choose_held_out(sources: Sequence[Source], holdout: Holdout) -> HoldoutChoice:
    """The contents of the training rows that are held out."""
    values = (
        row.values for source in sources for row in read_rows(source) if row.values is not None
    )
    return holdout_split(values, share=holdout.share, count=holdout.rows)


def prepare_all(
    train: Sequence[Source],
    held_out: Mapping[str, Sequence[Source]] | Holdout | None,
    template: Template,
    data: DataSection,
    *,
    max_length: int,
    faults_file: Path | None,
    cache: Path | None = None,
    processes: int | None = 1,
) -> tuple[Prepared, list[EvalSet]]:
    """The training documents with their ledger, and the held-out sets.

    Raises:
        DataError: bad rows under the `error` policies, or nothing to learn from.
    """

    def run(sources: Sequence[Source], keep: Keep | None) -> Prepared:
        return prepare(
            sources,
            template,
            train_on=data.train_on,
            max_length=max_length,
            too_long=data.too_long,
            bad_rows=data.bad_rows,
            faults_file=faults_file,
            keep=keep,
            cache=cache,
            processes=processes,
        )

    if isinstance(held_out, Holdout):
        choice = choose_held_out(train, held_out)
        prepared = run(train, Side(choice, False))
        prepared.ledger.note_holdout(str(held_out), choice)
        held = run(train, Side(choice, True))
        return prepared, [EvalSet("eval", held.documents, _joint_hash(choice.digests))]
    prepared = run(train, None)
    sets: list[EvalSet] = []
    for name, sources in (held_out or {}).items():
        held = run(sources, None)
        contents = [digest.encode() for digest in held.content_hashes.values()]
        sets.append(EvalSet(name, held.documents, _joint_hash(contents)))
    return prepared, sets


def _joint_hash(digests: Iterable[bytes]) -> str:
    """One sha256 for contents in any order."""
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def check_unchanged(
    before: Mapping[str, str], now: Mapping[str, str], *, hint: str | None = None
) -> None:
    """Refuse to go on with a run whose data is no longer what it was.

    Raises:
        DataError: names the source whose contents differ, or that there was not.
    """
    for name in [*before, *sorted({*now} - {*before})]:
        if now.get(name) != before.get(name):
            raise DataError(
                "its contents are not what this run was started with"
                if name in before
                else "this source is new since the run was started",
                where=name,
                hint=hint
                or "put it back as it was, or start anew: tunesmith train RUN/recipe.yaml --out "
                "NEW; `tunesmith resume RUN --changed-data` goes on with it",
            )
