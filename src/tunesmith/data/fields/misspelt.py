"""Misspelt names: edit distance of one (Damerau-Levenshtein, with transpositions) from a name of
ours.
"""

from __future__ import annotations

from collections.abc import Iterable

from tunesmith.data.fields.table import NOT_MISSPELT

_LEAST = 4  # letters; of shorter names too many are one letter away


def meant_by(name: str, names: Iterable[str]) -> str | None:
    """The first of `names` that differs by one typing error, by case or by underscores; None for
    none.
    """
    if name in NOT_MISSPELT:
        return None
    plain = _plain(name)
    if len(plain) < _LEAST:
        return None
    return next((one for one in names if name != one and _near(plain, _plain(one))), None)


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "").replace("-", "").replace(" ", "")


def _near(one: str, other: str) -> bool:
    """True if at most one letter is missing, added, changed, or swapped with its neighbour."""
    if abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    a, b = one[start:], other[start:]
    changed = a[1:] == b[1:] or a[1:] == b or a == b[1:]
    return changed or (a[1:2] + a[:1] == b[:2] and a[2:] == b[2:])
