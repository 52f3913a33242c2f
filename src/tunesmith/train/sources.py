"""The recipe's data as documents: sources found, held-out rows chosen, everything rendered and
counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.config.schema import DataSection, Holdout, SourceSection
from tunesmith.data.holdout import HoldoutChoice, holdout_split
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.data.sources import Source, read_rows, resolve_path
from tunesmith.data.template import Template
from tunesmith.errors import DataError
from tunesmith.train.job import EvalSet

Rows = Iterable[Mapping[str, Any]]
Keep = Callable[[Mapping[str, Any]], bool]


def make_sources(
    sections: Sequence[SourceSection], data: DataSection, *, folders: Sequence[Path] = ()
) -> list[Source]:
    """Sources with their files found: from the current folder, else from one of `folders`."""
    return [
        Source(
            name=section.path,
            path=_find(section.path, folders),
            format=section.format,
            columns=section.columns if section.columns is not None else data.columns,
            limit=section.limit,
        )
        for section in sections
    ]


def memory_source(rows: Rows, data: DataSection, *, name: str) -> list[Source]:
    """Rows given as Python objects, under a name that errors and the ledger use."""
    return [Source(name=name, rows=rows, columns=data.columns)]


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
        )

    if isinstance(held_out, Holdout):
        choice = choose_held_out(train, held_out)
        prepared = run(train, lambda values: not choice.holds(values))
        prepared.ledger.note_holdout(str(held_out), choice)
        held = run(train, choice.holds)
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


def _find(path: str, folders: Sequence[Path]) -> Path:
    found = resolve_path(path)
    for folder in folders:
        if found.exists():
            break
        found = resolve_path(path, folder)
    return found


def check_unchanged(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on with a run whose data is no longer what it was.

    Raises:
        DataError: names the source whose contents differ.
    """
    for name, digest in before.items():
        if now.get(name) != digest:
            raise DataError(
                "its contents are not what this run was started with",
                where=name,
                hint="put the file back, or start anew: tunesmith train RUN/recipe.yaml --out NEW",
            )
