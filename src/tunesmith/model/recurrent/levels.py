"""Level-order traversal of a prefix tree: the runs between branch points, by their depth.

A run is a stretch of tokens at whose end alone others branch off. All runs of a depth are
independent of each other once the states at the ends of their parents are known, so they form one
padded batch.

Letters: T tokens of the micro-batch, S runs of a batch, n steps of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.model.attention.layout_cache import LayoutCache
from tunesmith.types import IntArray, Layout

SHORT = 64
"""Runs up to this length share a batch whatever their lengths are: more batches would cost more
than their padding.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """The tokens [start, end), which continue the run `parent` (-1: none)."""

    start: int
    end: int
    parent: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class LevelBatch:
    """Runs of one depth and of similar length, padded to the longest."""

    runs: tuple[int, ...]  # [S]
    parents: tuple[int, ...]  # [S]; empty where they begin documents
    steps: int  # n
    tokens: Tensor  # [S * n] token of each step, T where it is padding
    real: Tensor  # steps in [0, S * n) that are no padding, run after run


@dataclass(frozen=True, slots=True)
class RunTree:
    """The batches of a layout in the order in which they can run, parents first."""

    runs: tuple[Run, ...]
    batches: tuple[LevelBatch, ...]
    inverse: Tensor  # [T] where each token's output is among the outputs of all batches
    predecessor: IntArray  # [T] the token before each on its path, -1 where there is none

    @property
    def single(self) -> bool:
        """Whether it is one sequence and nothing has to be rearranged."""
        return len(self.runs) == 1


_TREES: LayoutCache[RunTree] = LayoutCache(4)


def run_tree(layout: Layout, device: torch.device) -> RunTree:
    """The tree of a layout, its indices on the device; layers of a micro-batch share it."""
    return _TREES.get(layout, device, lambda: _make_tree(layout, device))


def split_runs(layout: Layout) -> tuple[Run, ...]:
    """The chains of a layout, cut where others branch off. Depth first, as they are laid out."""
    branch_points = {chain.prefix[-1][1] for chain in layout.chains if chain.prefix}
    runs: list[Run] = []
    ending_at: dict[int, int] = {}
    for chain in layout.chains:
        parent = ending_at[chain.prefix[-1][1]] if chain.prefix else -1
        inside = sorted(cut for cut in branch_points if chain.start < cut < chain.end)
        start = chain.start
        for end in (*inside, chain.end):
            runs.append(Run(start, end, parent))
            parent = ending_at[end] = len(runs) - 1
            start = end
    return tuple(runs)


def _make_tree(layout: Layout, device: torch.device) -> RunTree:
    runs = split_runs(layout)
    total = len(layout.position)
    batches: list[LevelBatch] = []
    order: list[np.ndarray] = []
    for level in _by_depth(runs):
        for group in _similar_lengths(level, runs):
            batches.append(_batch(group, runs, total, device))
            order += [np.arange(runs[i].start, runs[i].end) for i in group]
    inverse = np.empty(total, np.int64)
    inverse[np.concatenate(order)] = np.arange(total)
    return RunTree(runs, tuple(batches), torch.from_numpy(inverse).to(device), _before(runs, total))


def _by_depth(runs: Sequence[Run]) -> list[list[int]]:
    depth: list[int] = []
    levels: list[list[int]] = []
    for number, run in enumerate(runs):
        depth.append(0 if run.parent < 0 else depth[run.parent] + 1)
        if depth[number] == len(levels):
            levels.append([])
        levels[depth[number]].append(number)
    return levels


def _similar_lengths(level: Sequence[int], runs: Sequence[Run]) -> list[list[int]]:
    """Groups in which no run is shorter than half of the longest, so that padding stays below a
    factor of two.
    """
    groups: list[list[int]] = []
    longest = 0
    for number in sorted(level, key=lambda i: -runs[i].length):
        if not groups or (longest > SHORT and 2 * runs[number].length < longest):
            groups.append([])
            longest = runs[number].length
        groups[-1].append(number)
    return groups


def _batch(group: Sequence[int], runs: Sequence[Run], total: int, dev: torch.device) -> LevelBatch:
    steps = runs[group[0]].length
    tokens = np.full((len(group), steps), total, np.int64)
    for row, number in enumerate(group):
        tokens[row, : runs[number].length] = np.arange(runs[number].start, runs[number].end)
    flat = tokens.ravel()
    parents = tuple(runs[i].parent for i in group)
    return LevelBatch(
        runs=tuple(group),
        parents=() if parents[0] < 0 else parents,  # of one depth: all of them or none
        steps=steps,
        tokens=torch.from_numpy(flat).to(dev),
        real=torch.from_numpy(np.flatnonzero(flat < total)).to(dev),
    )


def _before(runs: Sequence[Run], total: int) -> IntArray:
    before = np.arange(-1, total - 1, dtype=np.int32)
    for run in runs:
        before[run.start] = runs[run.parent].end - 1 if run.parent >= 0 else -1
    return before
