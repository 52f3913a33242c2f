"""The batch sampler: which documents each optimizer step learns from, as a pure function of the
step's number (a stateless torch `BatchSampler`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.packing.strategies import Packs, best_fit
from tunesmith.data.sampling.mixture import Mixture
from tunesmith.data.sampling.prefix_groups import PrefixGroups
from tunesmith.types import IntArray

_PLANS_KEPT = 2
"""Epochs whose order is kept in memory: the current one and a neighbour."""


class BatchSampler:
    """The order of documents over all epochs. It has no state, so a resume needs only the step
    number.

    A step has `documents` documents, or as many as it takes to reach `tokens` tokens, where shared
    prefixes count in each document. No step spans two epochs, so the last step of an epoch may be
    smaller. An epoch contains every document once, or, with a `mixture`, is a pass over the
    mixture, in which documents may be missing or repeated; the mixture has its own seed and
    shuffling.

    With `pack_tokens` the documents of an epoch are packed first (best-fit decreasing), and a step
    has `documents` packs, or packs up to `tokens` tokens. With `groups`, documents that share a
    prefix follow each other, and the order of the steps is shuffled.
    """

    def __init__(
        self,
        lengths: Sequence[int] | IntArray,
        *,
        documents: int | None = None,
        tokens: int | None = None,
        seed: int,
        shuffle: bool,
        mixture: Mixture | None = None,
        pack_tokens: int | None = None,
        groups: PrefixGroups | None = None,
    ) -> None:
        if (documents is None) == (tokens is None):
            raise ValueError("a step is measured in either documents or tokens")
        if (documents or tokens or 0) < 1:
            raise ValueError("a step has at least one document or token")
        self._lengths: NDArray[np.int64] = np.asarray(lengths, dtype=np.int64)
        if len(self._lengths) == 0:
            raise ValueError("there are no documents")
        self._documents = documents
        self._tokens = tokens
        self._seed = seed
        self._shuffle = shuffle
        self._mixture = mixture
        self._pack_tokens = pack_tokens
        self._groups = groups
        # Only where this holds do all epochs have equally many steps: passes over a mixture differ,
        # and so may the number of their packs.
        self._equal_epochs = documents is not None and (pack_tokens is None or mixture is None)
        self._packed: dict[int, Packs] = {}
        self._first_steps = [0]  # number of the first step of each epoch seen so far
        self._plans: dict[int, tuple[IntArray, NDArray[np.int64]]] = {}

    @property
    def steps_per_epoch(self) -> int:
        """The steps of the first epoch; with `tokens`, later epochs may have a few more or
        fewer.
        """
        return len(self._plan(0)[1]) - 1

    def step_indices(self, step: int) -> IntArray:
        """The indices of the documents of a step, which is counted from 0. [documents] int32."""
        epoch, within = self._locate(step)
        order, bounds = self._plan(epoch)
        return order[bounds[within] : bounds[within + 1]]

    def epoch_after(self, step: int) -> float:
        """The epochs completed after this step (counted from 0), by documents: 1.0 is one pass."""
        epoch, within = self._locate(step)
        order, bounds = self._plan(epoch)
        return epoch + int(bounds[within + 1]) / len(order)

    def visits(self, steps: int) -> NDArray[np.int64]:
        """How often each document is in the first `steps` steps. [documents]"""
        visits = np.zeros(len(self._lengths), dtype=np.int64)
        if steps == 0:
            return visits
        epoch, within = self._locate(steps - 1)
        if self._mixture is None:
            visits += epoch
        else:
            whole = self._mixture.visits(epoch)
            visits[list(whole)] += np.fromiter(whole.values(), np.int64, len(whole))
        order, bounds = self._plan(epoch)
        np.add.at(visits, order[: bounds[within + 1]], 1)
        return visits

    def epoch_of(self, step: int) -> int:
        """The epoch (counted from 0) of a step (counted from 0)."""
        return self._locate(step)[0]

    def total_steps(self, epochs: float) -> int:
        """The number of steps for `epochs` epochs; a step that is begun counts in full."""
        whole = math.floor(epochs)
        share = epochs - whole
        steps = self._first_step(whole)
        if share > 0:
            order, bounds = self._plan(whole)
            # 0.1 * 30 is slightly above 3; without rounding that would add a step.
            wanted = math.ceil(round(share * len(order), 6))
            steps += int(np.searchsorted(bounds, wanted, side="left"))
        return max(steps, 1)

    def _locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its number inside that epoch."""
        if step < 0:
            raise ValueError("steps are counted from 0")
        if self._equal_epochs:
            return divmod(step, self.steps_per_epoch)
        while self._first_steps[-1] <= step:
            self._first_step(len(self._first_steps))
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return epoch, step - self._first_steps[epoch]

    def _first_step(self, epoch: int) -> int:
        if self._equal_epochs:
            return epoch * self.steps_per_epoch
        while len(self._first_steps) <= epoch:
            steps = len(self._plan(len(self._first_steps) - 1)[1]) - 1
            self._first_steps.append(self._first_steps[-1] + steps)
        return self._first_steps[epoch]

    def _plan(self, epoch: int) -> tuple[IntArray, NDArray[np.int64]]:
        """The order of an epoch, and the place where each step begins, with the end of the last
        step.
        """
        if epoch not in self._plans:
            while len(self._plans) >= _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> tuple[IntArray, NDArray[np.int64]]:
        if self._pack_tokens is not None:
            packs = self.packs(epoch)
            assert packs is not None
            # Packs stay as they are; the order in which steps take them is shuffled anew in each
            # epoch.
            chosen = self._shuffled(len(packs), epoch)
            items, ends = _regrouped(packs.items, packs.bounds, chosen)
            return self._taken(epoch)[items], ends[self._bounds(packs.tokens[chosen])]
        if self._groups is not None:
            order = self._groups.order((self._seed, epoch))
            # Steps are cut from the grouped order first and shuffled as wholes after, so that
            # groups stay in one step.
            bounds = self._bounds(self._lengths[order])
            return _regrouped(order, bounds, self._shuffled(len(bounds) - 1, epoch))
        order = self._order(epoch)
        return order, self._bounds(self._lengths[order])

    def packs(self, epoch: int) -> Packs | None:
        """The packs of an epoch, made of places in its order; None without packing. Without a
        mixture all epochs have the same packs.
        """
        if self._pack_tokens is None:
            return None
        number = 0 if self._mixture is None else epoch
        if number not in self._packed:
            lengths = self._lengths[self._taken(epoch)]
            self._packed = {number: best_fit(lengths, self._pack_tokens)}
        return self._packed[number]

    def _taken(self, epoch: int) -> IntArray:
        """The documents that are packed in an epoch."""
        if self._mixture is not None:
            return self._mixture.order(epoch)
        return np.arange(len(self._lengths), dtype=np.int32)

    def _order(self, epoch: int) -> IntArray:
        if self._mixture is not None:
            return self._mixture.order(epoch)
        return self._shuffled(len(self._lengths), epoch)

    def _shuffled(self, count: int, epoch: int) -> IntArray:
        if not self._shuffle:
            return np.arange(count, dtype=np.int32)
        generator = np.random.Generator(np.random.PCG64((self._seed, epoch)))
        return generator.permutation(count).astype(np.int32)

    def _bounds(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where steps begin among documents or packs of these lengths, with the end of the last
        step.
        """
        count = len(lengths)
        if self._documents is not None:
            starts = np.arange(0, count, self._documents, dtype=np.int64)
            return np.append(starts, count)
        reached = np.cumsum(lengths)
        bounds = [0]
        while bounds[-1] < count:
            before = int(reached[bounds[-1] - 1]) if bounds[-1] else 0
            last = int(np.searchsorted(reached, before + (self._tokens or 0), side="left"))
            bounds.append(min(last + 1, count))
        return np.asarray(bounds, dtype=np.int64)


def _regrouped(
    order: NDArray[Any], bounds: NDArray[np.int64], chosen: IntArray
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The groups of an order in another sequence, and where each then begins, with the end of the
    last.
    """
    sizes = np.diff(bounds)[chosen]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    starts = np.repeat(bounds[chosen] - ends[:-1], sizes)
    return order[starts + np.arange(ends[-1])], ends
