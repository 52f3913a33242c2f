"""Quantiles of a number over the targets of a step, from sums that micro-batches add up to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LOWEST, HIGHEST, PER_UNIT = -8, 40, 8
"""The histogram's range in natural logarithms, and its bins for each: steps of 13%."""

SHOWN = (0.5, 0.9, 0.99)


def log_histogram(
    values: NDArray[np.floating], weight: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Weight by logarithm; what lies outside the range is in the first or last bin."""
    bins = (HIGHEST - LOWEST) * PER_UNIT
    bounded = np.clip(values, LOWEST, HIGHEST)
    places = np.minimum(((bounded - LOWEST) * PER_UNIT).astype(np.int64), bins - 1)
    return np.bincount(places, weights=weight, minlength=bins).astype(np.float64)


def quantiles(
    histogram: NDArray[np.float64], shares: Sequence[float] = SHOWN
) -> dict[float, float]:
    """The values (no longer logarithms) below which the shares of the weight lie."""
    reached = np.cumsum(histogram)
    if reached[-1] == 0:
        return {}
    found: dict[float, float] = {}
    for share in shares:
        place = int(np.searchsorted(reached, share * reached[-1]))
        before = float(reached[place - 1]) if place else 0.0
        inside = (share * float(reached[-1]) - before) / max(float(histogram[place]), 1e-300)
        found[share] = float(np.exp(LOWEST + (place + min(inside, 1.0)) / PER_UNIT))
    return found
