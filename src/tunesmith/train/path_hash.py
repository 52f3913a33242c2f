"""Hashes of token paths: equal for equal ids from the first token on, wherever a layout places
them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.microbatch.planner import MicrobatchPlan
from tunesmith.types import Document, IntArray

_PRIME = 2**61 - 1
_BASE = 1_000_003_700_001_911
"""Of a polynomial hash: two of a billion paths meet with a probability below one in a million
million.
"""


def _step(key: int, token: int) -> int:
    return (key * _BASE + token + 1) % _PRIME


def _along(key: int, ids: IntArray) -> list[int]:
    keys: list[int] = []
    for token in ids.tolist():
        key = _step(key, token)
        keys.append(key)
    return keys


def token_keys(plan: MicrobatchPlan) -> NDArray[np.int64]:
    """The key of the path that ends in each packed token, [T]."""
    keys = np.empty(len(plan.ids), np.int64)
    for chain in plan.layout.chains:
        above = int(keys[chain.prefix[-1][1] - 1]) if chain.prefix else 0
        keys[chain.start : chain.end] = _along(above, plan.ids[chain.start : chain.end])
    return keys


def target_keys(plan: MicrobatchPlan) -> NDArray[np.int64]:
    """The key of the path that each target ends, [N]."""
    if plan.part is not None:
        return target_keys(plan.part.whole)[plan.part.targets]
    sources = token_keys(plan)[plan.source]
    pairs = zip(sources.tolist(), plan.target.tolist(), strict=True)
    return np.fromiter((_step(key, token) for key, token in pairs), np.int64, len(sources))


def document_target_keys(document: Document) -> list[int]:
    """The key of the path that each target of the document ends, segment by segment."""
    last: list[list[int]] = []
    found: list[int] = []
    for segment in document.segments:
        above = last[segment.parent][-1] if segment.parent >= 0 else 0
        keys = _along(above, segment.ids)
        last.append(keys)
        found += [keys[index] for index in segment.index.tolist()]
    return found


def path_ends(document: Document) -> dict[int, int]:
    """Key -> number of tokens of each path that is run for the document: from a root to a token
    that predicts a target and has no such token after it.
    """
    along: list[list[int]] = []  # keys of each segment's path, from the root
    inner: set[int] = set()
    candidates: list[list[int]] = []
    for segment in document.segments:
        above = along[segment.parent] if segment.parent >= 0 else []
        keys = above + _along(above[-1] if above else 0, segment.ids)
        along.append(keys)
        if len(segment.index):
            candidates.append(keys[: segment.start + int(segment.index[-1])])
    for keys in candidates:
        inner.update(keys[:-1])
    return {keys[-1]: len(keys) for keys in candidates if keys[-1] not in inner}
