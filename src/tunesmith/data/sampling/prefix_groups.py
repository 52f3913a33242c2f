"""Grouping of documents by shared prefix (rolling hashes of token blocks, as prefix caches do), so
that documents of one step share more tokens.

Prefixes are compared in blocks of `BLOCK` tokens. Shorter prefixes save next to nothing, and steps
grouped by the first word of an answer would be biased samples. Of each document the path to its
first leaf is hashed. Hashes have 64 bits; a collision would only put unrelated documents into one
step, which is harmless.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import Document, IntArray

BLOCK = 16
"""Tokens per block."""

_Hashes = NDArray[np.uint64]
_FACTORS = np.random.Generator(np.random.PCG64(0)).integers(1, 2**64, BLOCK, np.uint64) | np.uint64(
    1
)
_STRIDE = np.uint64(0x9E3779B97F4A7C15)


class PrefixGroups:
    """Documents grouped by a shared prefix, the groups divided further by longer prefixes, and so
    on.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self._count = len(documents)
        self._levels: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        # At each level the documents with at least that many blocks are grouped by the hash of all
        # tokens up to the block's end.
        hashes = [prefix_hashes(documents[number]) for number in range(self._count)]
        depth = np.array([len(one) for one in hashes], np.int64)
        begin = np.cumsum(depth) - depth
        flat = np.concatenate([np.empty(0, np.uint64), *hashes])
        alive, groups, level = np.flatnonzero(depth > 0), 0, 0
        while len(alive):
            _, which, count = np.unique(
                flat[begin[alive] + level], return_inverse=True, return_counts=True
            )
            shared = count[which] > 1
            members = alive[shared]
            found = int((count > 1).sum())
            # A level with the same groups as the one before it adds nothing.
            if len(members) and (found != groups or len(members) < len(alive)):
                self._levels.append((members, which[shared]))
            level, groups = level + 1, found
            alive = members[depth[members] > level]

    @property
    def grouped(self) -> int:
        """The number of documents that share a prefix with another one."""
        return len(self._levels[0][0]) if self._levels else 0

    def order(self, seed: Sequence[int]) -> IntArray:
        """A random order of all documents in which groups stay together. [documents] int32

        Groups are in random order, and so are the members of each. It is a pure function of `seed`;
        no other random stream uses this seed followed by a 1.
        """
        random = np.random.Generator(np.random.PCG64((*seed, 1)))
        keys = [random.random(self._count)]
        for members, group in reversed(self._levels):
            # Every member of a group draws the same key, so a sort by it keeps the group together;
            # a document in no group draws its own.
            key = random.random(self._count)
            key[members] = random.random(int(group.max()) + 1)[group]
            keys.append(key)
        return np.lexsort(keys).astype(np.int32)


def prefix_hashes(document: Document) -> _Hashes:
    """For each whole block on the path to the first leaf the hash of all tokens up to its end.
    [blocks]
    """
    parts: list[IntArray] = []
    at = 0
    while at >= 0:
        parts.append(document.segments[at].ids)
        at = next((n for n, one in enumerate(document.segments) if one.parent == at), -1)
    ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
    blocks = len(ids) // BLOCK
    flat: _Hashes = ids[: blocks * BLOCK].astype(np.uint64)
    table = np.reshape(flat, (blocks, BLOCK))
    mixed = ((table + np.uint64(1)) * _FACTORS).sum(axis=1, dtype=np.uint64)
    mixed += np.arange(1, blocks + 1, dtype=np.uint64) * _STRIDE
    mixed ^= mixed >> np.uint64(31)
    mixed *= _STRIDE
    mixed ^= mixed >> np.uint64(29)
    return np.cumsum(mixed, dtype=np.uint64)
