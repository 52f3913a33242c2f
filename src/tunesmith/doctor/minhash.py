"""Near-duplicate detection by MinHash with banded LSH (Broder 1997), then exact Jaccard similarity.

A text is the set of its runs of SIZE words. Two texts are alike as their sets overlap (Jaccard
index). MinHash (Broder 1997) keeps, for each of some random hash functions, the least value over
the set; two texts agree in one of them with a probability equal to their Jaccard index. Texts that
agree in all values of a band are candidates, and those are then counted exactly.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 3
"""Words of a run: one changed word in a text of n costs SIZE of its n - SIZE + 1 runs."""
BANDS, ROWS = 16, 4
"""A pair with Jaccard index j is found with probability 1 - (1 - j**ROWS)**BANDS: 98.8% at 0.7,
99.98% at 0.8; one at 0.3 is counted in vain with 12%."""
_CHUNK = 1 << 20
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

_Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Pair:
    """Texts `first` < `second`, and how alike they are (Jaccard index, 0..1)."""

    first: int
    second: int
    alike: float


def near_pairs(
    texts: Sequence[Sequence[str]], *, threshold: float, least: int, seed: int = 0
) -> list[Pair]:
    """Pairs of word lists with a Jaccard index of at least `threshold`, ordered by `second`.

    Texts with fewer than `least` different runs are left out: chance makes those alike. Of a crowd
    of equals each is paired with the first and with the one before it, not with all, so the number
    of pairs grows with the number of texts. Pairs just above the threshold may be missed (BANDS).
    """
    runs = [_runs(hashes) for hashes in _word_hashes(texts)]
    kept = [number for number, found in enumerate(runs) if len(found) >= max(least, 1)]
    if len(kept) < 2:
        return []
    signatures = _signatures([runs[number] for number in kept], seed)
    pairs: list[Pair] = []
    for a, b in _candidates(signatures):
        first, second = kept[a], kept[b]
        alike = _jaccard(runs[first], runs[second])
        if alike >= threshold:
            pairs.append(Pair(first, second, alike))
    return sorted(pairs, key=lambda pair: (pair.second, -pair.alike))


def _word_hashes(texts: Sequence[Sequence[str]]) -> list[_Hashes]:
    """A random 64-bit number for each word; the same word gets the same one."""
    numbers: dict[str, int] = {}
    coded = [[numbers.setdefault(word, len(numbers)) for word in words] for words in texts]
    drawn = np.random.default_rng(1).integers(1, 2**63, len(numbers) + 1, dtype=np.uint64)
    return [drawn[np.array(codes, np.int64)] for codes in coded]


def _runs(words: _Hashes) -> _Hashes:
    """Hashes of the different runs of SIZE words, ascending; a shorter text is one run."""
    length = max(len(words) - SIZE + 1, min(len(words), 1))
    runs = np.zeros(length, np.uint64)
    for offset in range(min(SIZE, len(words))):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + words[offset : offset + length]
    return np.unique(_mixed(runs))


def _mixed(values: _Hashes) -> _Hashes:
    """Every bit of the result depends on every bit of the value (the finish of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _signatures(runs: Sequence[_Hashes], seed: int) -> _Hashes:
    """[texts, BANDS * ROWS] the least value of each hash function over each text's runs."""
    functions = BANDS * ROWS
    salts = np.random.default_rng(seed).integers(0, 2**63, functions, dtype=np.uint64)
    signatures = np.empty((len(runs), functions), np.uint64)
    start = 0
    while start < len(runs):
        end, size = start, 0
        while end < len(runs) and (end == start or size + len(runs[end]) <= _CHUNK):
            size += len(runs[end])
            end += 1
        joined = np.concatenate(runs[start:end])
        lengths = [len(found) for found in runs[start:end]]
        begins = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]).astype(np.int64)
        for function, salt in enumerate(salts):
            signatures[start:end, function] = np.minimum.reduceat(_mixed(joined ^ salt), begins)
        start = end
    return signatures


def _candidates(signatures: _Hashes) -> list[tuple[int, int]]:
    """Pairs that agree in a whole band: each member with the band's first and with the last one."""
    found: list[NDArray[np.int64]] = []
    for band in range(BANDS):
        keys = np.zeros(len(signatures), np.uint64)
        for column in range(band * ROWS, (band + 1) * ROWS):
            keys = _mixed(keys * np.uint64(0x9E3779B97F4A7C15) + signatures[:, column])
        order = np.argsort(keys, kind="stable")
        ranked = keys[order]
        fresh = np.concatenate([[True], ranked[1:] != ranked[:-1]])
        first = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
        joins = np.flatnonzero(~fresh)
        found.append(np.stack([first[joins], order[joins]], axis=1))
        found.append(np.stack([order[joins - 1], order[joins]], axis=1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return [(int(a), int(b)) for a, b in pairs if a != b]


def _jaccard(a: _Hashes, b: _Hashes) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def words_of(text: str) -> list[str]:
    """Lower-case words; a character of a script without spaces is a word of its own."""
    return _WORD.findall(text.lower())


def plain(text: str) -> str:
    """The text with one Unicode form, one case and single spaces, so that equal reads equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
