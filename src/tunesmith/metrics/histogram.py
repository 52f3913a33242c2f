"""Weighted quantiles from log-scale histograms, which add up over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LOWEST, HIGHEST, PER_UNIT = -8, 40, 8
"""Range of the histogram in natural logarithms, and bins per unit: a bin is 13% wide."""

SHOWN = (0.5, 0.9, 0.99)

EMPTY_HISTOGRAM = np.zeros((2, (HIGHEST - LOWEST) * PER_UNIT))
"""A histogram of no values, to which others are added."""


def log_histogram(
    values: NDArray[np.floating], weight: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The histogram of values that are natural logarithms.

    Returns:
        [2, bins]: the sum of weights, and the sum of weight * value. Values outside the range are
        clipped to it.
    """
    bins = (HIGHEST - LOWEST) * PER_UNIT
    bounded = np.clip(values, LOWEST, HIGHEST)
    places = np.minimum(((bounded - LOWEST) * PER_UNIT).astype(np.int64), bins - 1)
    sums = [np.bincount(places, weights=w, minlength=bins) for w in (weight, weight * bounded)]
    return np.stack(sums).astype(np.float64)


def quantiles(
    histogram: NDArray[np.float64], shares: Sequence[float] = SHOWN
) -> dict[float, float]:
    """The values (exp of the logarithms) below which the shares of the weight lie.

    Each is the weighted mean of the bin in which the quantile falls. Empty without weight.
    """
    weight, summed = histogram
    reached = np.cumsum(weight)
    if reached[-1] == 0:
        return {}
    places = {share: int(np.searchsorted(reached, share * reached[-1])) for share in shares}
    return {share: float(np.exp(summed[place] / weight[place])) for share, place in places.items()}
