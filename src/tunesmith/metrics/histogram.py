"""Weighted quantiles over the targets of a step, from log histograms that micro-batches sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LOWEST, HIGHEST, PER_UNIT = -8, 40, 8
"""The histogram's range in natural logarithms, and its bins for each: steps of 13%."""

SHOWN = (0.5, 0.9, 0.99)

EMPTY_HISTOGRAM = np.zeros((2, (HIGHEST - LOWEST) * PER_UNIT))
"""What histograms are added to."""


def log_histogram(
    values: NDArray[np.floating], weight: NDArray[np.floating]
) -> NDArray[np.float64]:
    """[2, bins] by logarithm: the weight, and the sum of weight * value; what lies outside the
    range counts as its bound.
    """
    bins = (HIGHEST - LOWEST) * PER_UNIT
    bounded = np.clip(values, LOWEST, HIGHEST)
    places = np.minimum(((bounded - LOWEST) * PER_UNIT).astype(np.int64), bins - 1)
    sums = [np.bincount(places, weights=w, minlength=bins) for w in (weight, weight * bounded)]
    return np.stack(sums).astype(np.float64)


def quantiles(
    histogram: NDArray[np.float64], shares: Sequence[float] = SHOWN
) -> dict[float, float]:
    """The values (no longer logarithms) below which the shares of the weight lie: the mean of the
    bin that each falls in.
    """
    weight, summed = histogram
    reached = np.cumsum(weight)
    if reached[-1] == 0:
        return {}
    places = {share: int(np.searchsorted(reached, share * reached[-1])) for share in shares}
    return {share: float(np.exp(summed[place] / weight[place])) for share, place in places.items()}
