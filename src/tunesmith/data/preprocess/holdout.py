"""The held-out split: evaluation rows chosen by a hash of their content, not by their position.

So it does not change when rows are reordered or added, and equal rows are on the same side.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data.formats.detect import CONTENT
from tunesmith.data.sources.sources import canonical_json
from tunesmith.errors import DataError


@dataclass(frozen=True, slots=True)
class HoldoutChoice:
    """The held-out contents by SHA-256, and the number of rows that have them."""

    digests: frozenset[bytes]
    rows: int

    def holds(self, values: Mapping[str, Any]) -> bool:
        """True if this row is held out for evaluation."""
        return row_digest(values) in self.digests


@dataclass(frozen=True, slots=True)
class Side:
    """A filter for rows: true for the held-out ones (`held`) or for the others."""

    choice: HoldoutChoice
    held: bool

    def __call__(self, values: Mapping[str, Any]) -> bool:
        return self.choice.holds(values) is self.held

    @property
    def key(self) -> str:
        """A hash in hex that identifies this filter, for the cache key."""
        contents = b"".join(sorted(self.choice.digests))
        return hashlib.sha256(bytes([self.held]) + contents).hexdigest()


def row_digest(values: Mapping[str, Any]) -> bytes:
    """The SHA-256 of a row's canonical JSON: of the columns that are learned from, or of all if it
    has none.
    """
    content = {name: values[name] for name in CONTENT if values.get(name) is not None}
    return hashlib.sha256(canonical_json(content or dict(values))).digest()


def holdout_split(
    rows: Iterable[Mapping[str, Any]], *, share: float | None = None, count: int | None = None
) -> HoldoutChoice:
    """Hold out the rows with the smallest hashes: `count` rows, or the fraction `share` of all.

    Rows of the same content stay together, so there may be a few more. The order of rows does not
    matter.

    Raises:
        DataError: nothing would be left to train on.
    """
    if (share is None) == (count is None):
        raise ValueError("a hold-out is either a share or a number")
    seen = Counter(row_digest(values) for values in rows)
    total = seen.total()
    wanted = count if count is not None else max(1, round((share or 0.0) * total))
    chosen: set[bytes] = set()
    held = 0
    for digest in sorted(seen):
        if held >= wanted:
            break
        chosen.add(digest)
        held += seen[digest]
    if held >= total:
        asked = f"{count} rows" if count is not None else f"{(share or 0.0) * 100:g}%"
        raise DataError(
            f"holding out {asked} of {total} rows with {len(seen)} different contents leaves none "
            "to train on",
            where="data.eval",
            hint="hold out fewer rows, or name evaluation files in data.eval",
        )
    return HoldoutChoice(frozenset(chosen), held)
