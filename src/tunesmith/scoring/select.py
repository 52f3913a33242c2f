"""Data selection: scores matched with their rows, and rules applied in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.formats.detect import CONTENT
from tunesmith.data.preprocess.holdout import row_digest
from tunesmith.data.sources.sources import Source, content_hash, read_rows, rename_columns
from tunesmith.doctor.minhash import near_pairs, words_of
from tunesmith.errors import DataError
from tunesmith.scoring.rules import Remaining, Rule, parse_rule
from tunesmith.scoring.table import ScoredSource, Scores

UNSCORED = "no score: "
NOT_IN = "not in the scores"
LEAST = 5
"""Texts with fewer different word runs than this are alike by chance and count as duplicates only
if they are equal."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The rows of the data that have scores, in the data's order. Shapes: [n] each."""

    sources: Sequence[Source]
    scored: Sequence[ScoredSource]  # of each source
    source: NDArray[np.int64]  # number in `sources`
    row: NDArray[np.int64]
    numbers: Mapping[str, NDArray[np.float64]]


@dataclass(slots=True)
class Step:
    """What one rule did, or what was left out before the first: rows and target tokens."""

    text: str
    rows: list[tuple[int, int]]  # left out: (number of the source, row)
    target_tokens: int  # of these
    missing: int = 0  # of these, rows that have no value in the rule's column
    bounds: tuple[float, float] | None = None


@dataclass(slots=True)
class Selection:
    """Which rows are kept, and by which step each other was left out."""

    pool: Pool
    kept: NDArray[np.intp]  # places in the pool, ascending
    steps: list[Step] = field(default_factory=list[Step])

    @property
    def target_tokens(self) -> int:
        """Of the kept rows."""
        return int(self.pool.numbers["target_tokens"][self.kept].sum())


def match_sources(sources: Sequence[Source], scores: Sequence[Scores]) -> list[ScoredSource]:
    """What each source was when it was scored, found by its contents.

    Raises:
        DataError: a source is not the one that was scored, or none of them.
    """
    known = {name: found for file in scores for name, found in file.sources.items()}
    by_content = {found.sha256: found for file in scores for found in file.sources.values()}
    matched: list[ScoredSource] = []
    for source in sources:
        digest = content_hash(source)
        if digest not in by_content:
            if source.name in known:
                raise DataError(
                    "its contents are not those that were scored",
                    where=source.name,
                    hint="put the file back, or score it again with `tunesmith score`",
                )
            raise DataError(
                f"there are no scores of it, but of {', '.join(known)}",
                where=source.name,
                hint="score it with `tunesmith score`, and give both score files",
            )
        matched.append(by_content[digest])
    return matched


def gather(sources: Sequence[Source], scores: Sequence[Scores]) -> Selection:
    """All rows of the sources that can be chosen from; the others are left out, with the reason.

    Raises:
        DataError: as `match_sources`; or a row has two scores.
    """
    matched = match_sources(sources, scores)
    number_of = {found.sha256: number for number, found in enumerate(matched)}
    if len(number_of) < len(matched):
        raise DataError("two of the files have the same contents", where="--data")
    lines: dict[tuple[int, int], tuple[Scores, int]] = {}
    for file in scores:
        hashes = {name: found.sha256 for name, found in file.sources.items()}
        for at, (name, row) in enumerate(zip(file.source, file.row.tolist(), strict=True)):
            key = (number_of.get(hashes[name], -1), row)
            if key[0] < 0:
                continue
            if key in lines:
                where = f"{sources[key[0]].name}:{row}"
                raise DataError("has two lines in the scores", where=where, hint="give one file")
            lines[key] = (file, at)
    return _pool(sources, matched, lines)


def _pool(
    sources: Sequence[Source],
    matched: Sequence[ScoredSource],
    lines: Mapping[tuple[int, int], tuple[Scores, int]],
) -> Selection:
    names = sorted({name for file, _ in lines.values() for name in file.numbers})
    without: dict[str, list[tuple[int, int]]] = {}
    places: list[tuple[int, int]] = []
    for number, source in enumerate(sources):
        for row in read_rows(replace(source, columns=None, limit=None, verbatim=True)):
            key = (number, row.origin.row)
            if key not in lines:
                without.setdefault(NOT_IN, []).append(key)
                continue
            file, at = lines[key]
            if np.isnan(file.numbers["loss"][at]) or row.values is None:
                reason = UNSCORED + (file.reason[at] or "nothing to learn")
                without.setdefault(reason, []).append(key)
                continue
            places.append(key)
    found = [lines[place] for place in places]
    numbers = {
        name: np.array(
            [file.numbers[name][at] if name in file.numbers else np.nan for file, at in found],
            np.float64,
        )
        for name in names
    }
    array = np.array(places, np.int64).reshape(-1, 2)
    pool = Pool(sources, matched, array[:, 0], array[:, 1], numbers)
    steps = [Step(reason, rows, 0) for reason, rows in without.items()]
    return Selection(pool, np.arange(len(places)), steps)


def parse_rules(texts: Sequence[str], pool: Pool) -> list[Rule]:
    """The rules, in their order.

    Raises:
        RecipeError: one is no rule, or names a column that the scores don't have.
    """
    return [parse_rule(text, list(pool.numbers)) for text in texts]


def apply_rules(selection: Selection, rules: Sequence[Rule]) -> Selection:
    """What the rules leave, one after the other."""
    kept, steps = selection.kept, list(selection.steps)
    pool = selection.pool
    for rule in rules:
        outcome = rule.apply(_remaining(pool, kept))
        out = kept[~outcome.stateful]
        rows = list(zip(pool.source[out].tolist(), pool.row[out].tolist(), strict=True))
        tokens = int(pool.numbers["target_tokens"][out].sum())
        steps.append(Step(rule.text, rows, tokens, outcome.missing, outcome.bounds))
        kept = kept[outcome.stateful]
    return Selection(pool, kept, steps)


def _remaining(pool: Pool, kept: NDArray[np.intp]) -> Remaining:
    def digests() -> list[bytes]:
        return [row_digest(values) for values in _contents(pool, kept)]

    def near(alike: float) -> list[tuple[int, int]]:
        texts = [words_of(" ".join(_strings(_content(v)))) for v in _contents(pool, kept)]
        pairs = near_pairs(texts, threshold=alike, least=LEAST)
        return [(pair.first, pair.second) for pair in pairs]

    return Remaining(
        column=lambda name: pool.numbers[name][kept],
        target_tokens=pool.numbers["target_tokens"][kept],
        digests=digests,
        near=near,
    )


def raw_rows(pool: Pool, kept: NDArray[np.intp]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the source, values as the file has them) of the kept rows, in their order."""
    wanted = [
        set(pool.row[kept[pool.source[kept] == n]].tolist()) for n in range(len(pool.sources))
    ]
    for number, source in enumerate(pool.sources):
        for row in read_rows(replace(source, columns=None, limit=None, verbatim=True)):
            if row.origin.row in wanted[number]:
                assert row.values is not None
                yield number, row.values


def _contents(pool: Pool, kept: NDArray[np.intp]) -> Iterator[dict[str, Any]]:
    for number, values in raw_rows(pool, kept):
        yield rename_columns(values, pool.scored[number].columns)


def _content(values: Mapping[str, Any]) -> Any:
    """The columns that are learned from, where the row has them under our names; else all."""
    return {name: values[name] for name in CONTENT if name in values} or values


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
