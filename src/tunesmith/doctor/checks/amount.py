"""Checks of data size: rows, steps, and outliers of length."""

from __future__ import annotations

import numpy as np

from tunesmith.doctor.corpus import Corpus, Setup
from tunesmith.doctor.outcome import Hit, Level, Outcome

FEW_ROWS, FEW_STEPS = 50, 50
FENCE = 3.0
"""Interquartile ranges beyond the quartiles of log lengths (Tukey's outer fence). Of a log-normal
distribution, the usual one of text lengths, 2 rows in a million are beyond it."""
TIMES = 4
"""A row must also be this much longer or shorter than the middle one: equal rows have no range."""
_LEAST = 20  # rows from which quartiles mean something


def small(corpus: Corpus, setup: Setup) -> Outcome:
    """Very little data, or very few steps."""
    rows = sum(
        case.rendered is not None and case.rendered.document is not None for case in corpus.train
    )
    steps = setup.total_steps
    few_steps = steps is not None and steps < FEW_STEPS
    level: Level = "info"
    if rows < FEW_ROWS:
        level = "warning" if rows else "error"
    said = f"{rows:,} rows to learn from" + (f", {steps:,} steps in all" if steps else "")
    hits = [Hit("data.train", said)] if rows < FEW_ROWS or few_steps else []
    hint = "more rows; for more steps of the same data a smaller batch.documents or more epochs"
    return Outcome(hits, 1, "data set", level, hint)


def outliers(corpus: Corpus, setup: Setup) -> Outcome:
    """Rows far longer or shorter than the others."""
    cases = [case for case in corpus.train if case.length > 0]
    if len(cases) < _LEAST:
        return Outcome([], len(cases), "rows", "info", "")
    logs = np.log([case.length for case in cases])
    low, middle, high = np.quantile(logs, [0.25, 0.5, 0.75])
    reach = FENCE * (high - low)
    least = np.log(TIMES)
    above = (logs > high + reach) & (logs > middle + least)
    below = (logs < low - reach) & (logs < middle - least)
    median = round(float(np.exp(middle)))
    found = sorted(np.flatnonzero(above | below), key=lambda n: -abs(logs[n] - middle))
    hits = [
        Hit(str(cases[n].origin), f"{cases[n].length:,} tokens; the median is {median:,}")
        for n in found
    ]
    hint = "look at them: a file pasted into a row, or a row cut short"
    return Outcome(hits, len(cases), "rows", "info", hint)


def context(corpus: Corpus, setup: Setup) -> Outcome:
    """A `max_length` beyond the positions that the model was made for, with rows that long."""
    limit = setup.template.context_length
    hits = [
        Hit(str(case.origin), f"{case.length:,} tokens; the model's context is {limit:,}")
        for case in corpus.cases
        if limit is not None and case.length > limit and not case.over_long
    ]
    hint = f"data.max_length={limit}, or a model with a longer context"
    return Outcome(hits, len(corpus.cases), "rows", "error", hint)
