"""Selection rules as text: `top 10% by ifd`, `loss between 5% and 95%`, `dedup`.

A rule sees the rows that those before it have left, and leaves out some of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import RecipeError

Numbers = NDArray[np.float64]
Kept = NDArray[np.bool_]

NEAR, LEAST_NEAR = 0.8, 0.7
GRAMMAR = (
    "top N by COLUMN, bottom 10% by COLUMN, COLUMN between 5% and 95%, COLUMN between 0.2 and 0.9, "
    "COLUMN < 1 (also <=, >, >=), dedup, dedup near 0.8, budget 100000 (by COLUMN)"
)


@dataclass(frozen=True, slots=True)
class Remaining:
    """The rows that a rule sees, in the data's order; all of one length n."""

    column: Callable[[str], Numbers]  # [n], NaN where a row has no value
    target_tokens: Numbers  # [n]
    digests: Callable[[], Sequence[bytes]]  # of each row's content
    near: Callable[[float], Sequence[tuple[int, int]]]  # pairs of alike rows, the earlier first


@dataclass(frozen=True, slots=True)
class Outcome:
    """Which of the remaining rows a rule keeps, [n]; `missing` of the others have no value in its
    column. `bounds` are the values that quantiles became.
    """

    stateful: Kept
    missing: int = 0
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """`apply` does what `text` says; `column` is the one it reads, if any."""

    text: str
    column: str | None
    apply: Callable[[Remaining], Outcome]


def parse_rule(text: str, columns: Sequence[str]) -> Rule:
    """The rule that `text` means.

    Raises:
        RecipeError: it is none, or names a column that the scores don't have.
    """
    words = " ".join(text.split())
    for pattern, make in _FORMS:
        found = pattern.fullmatch(words)
        if found is None:
            continue
        named = found.groupdict()
        column = named.get("column")
        if column is not None and column not in columns:
            close = get_close_matches(column, columns, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(columns)}"
            raise RecipeError(f"the scores have no column {column}", where=words, hint=hint)
        return Rule(words, column, make(words, named))
    raise RecipeError(f"{text!r} is no rule", where="--keep", hint=f"rules are: {GRAMMAR}")


_Named = Mapping[str, "str | None"]
_Apply = Callable[[Remaining], Outcome]


def _end(words: str, named: _Named) -> _Apply:
    """The rows with the largest or smallest values; of equals the earlier."""
    share = named["unit"] == "%"
    amount = _number(str(named["amount"]))
    if (share and amount > 100) or (not share and amount != int(amount)):
        raise RecipeError("a share is at most 100%, a count a whole number", where=words)
    sign = -1.0 if named["end"] == "top" else 1.0

    def apply(rows: Remaining) -> Outcome:
        values = rows.column(str(named["column"]))
        having = np.flatnonzero(~np.isnan(values))
        count = int(np.ceil(len(having) * amount / 100)) if share else int(amount)
        order = having[np.argsort(sign * values[having], kind="stable")]
        return Outcome(_mask(order[:count], len(values)), len(values) - len(having))

    return apply


def _between(words: str, named: _Named) -> _Apply:
    """The rows from one value to another, or from one quantile to another, ends included."""
    low, high = _number(str(named["low"])), _number(str(named["high"]))
    quantiles = named["unit"] == "%"
    if (named["unit"] or "") != (named["other"] or ""):
        raise RecipeError("one end is a quantile and the other a value", where=words)
    if low > high or (quantiles and high > 100):
        raise RecipeError("the ends are the wrong way round or over 100%", where=words)

    def apply(rows: Remaining) -> Outcome:
        values = rows.column(str(named["column"]))
        having = ~np.isnan(values)
        ends = (low, high)
        if quantiles and having.any():
            first, last = np.quantile(values[having], [low / 100, high / 100])
            ends = (float(first), float(last))
        kept = having & (values >= ends[0]) & (values <= ends[1])
        return Outcome(kept, int((~having).sum()), ends)

    return apply


_COMPARE = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


def _compared(words: str, named: _Named) -> _Apply:
    """The rows whose value is below or above a bound."""
    bound, holds = _number(str(named["amount"])), _COMPARE[str(named["sign"])]

    def apply(rows: Remaining) -> Outcome:
        values = rows.column(str(named["column"]))
        having = ~np.isnan(values)
        return Outcome(having & holds(values, bound), int((~having).sum()))

    return apply


def _exact(words: str, named: _Named) -> _Apply:
    """The first row of each content."""

    def apply(rows: Remaining) -> Outcome:
        seen: set[bytes] = set()
        kept: list[bool] = []
        for digest in rows.digests():
            kept.append(digest not in seen)
            seen.add(digest)
        return Outcome(np.array(kept, bool))

    return apply


def _near(words: str, named: _Named) -> _Apply:
    """The rows that are not nearly the same as an earlier one that is kept."""
    alike = _number(named["amount"] or str(NEAR))
    if not LEAST_NEAR <= alike <= 1:
        raise RecipeError(
            f"likeness is from {LEAST_NEAR} to 1: less alike pairs would be missed", where=words
        )

    def apply(rows: Remaining) -> Outcome:
        kept = np.ones(len(rows.target_tokens), bool)
        earlier: dict[int, list[int]] = {}
        for first, second in rows.near(alike):
            earlier.setdefault(second, []).append(first)
        for second in sorted(earlier):
            kept[second] = not any(kept[first] for first in earlier[second])
        return Outcome(kept)

    return apply


def _budget(words: str, named: _Named) -> _Apply:
    """Rows in order, or those with the largest values, until the next would go over the budget."""
    tokens = _number(str(named["amount"]))

    def apply(rows: Remaining) -> Outcome:
        order = np.arange(len(rows.target_tokens))
        if named["column"] is not None:
            values = rows.column(named["column"])
            having = np.flatnonzero(~np.isnan(values))
            order = having[np.argsort(-values[having], kind="stable")]
        missing = len(rows.target_tokens) - len(order)
        spent = np.cumsum(rows.target_tokens[order])
        return Outcome(_mask(order[spent <= tokens], len(rows.target_tokens)), missing)

    return apply


def _mask(numbers: NDArray[np.intp], length: int) -> Kept:
    kept = np.zeros(length, bool)
    kept[numbers] = True
    return kept


def _number(text: str) -> float:
    return float(text.replace("_", "").replace(",", ""))


_NUMBER = r"-?[\d_,]*\.?\d+(?:[eE][-+]?\d+)?"
_COLUMN = r"(?P<column>[A-Za-z_]\w*)"
_FORMS: tuple[tuple[re.Pattern[str], Callable[[str, _Named], _Apply]], ...] = (
    (re.compile(rf"(?P<end>top|bottom) (?P<amount>\d[\d_,.]*) ?(?P<unit>%?) by {_COLUMN}"), _end),
    (
        re.compile(
            rf"{_COLUMN} between (?P<low>{_NUMBER}) ?(?P<unit>%?) and (?P<high>{_NUMBER}) ?"
            r"(?P<other>%?)"
        ),
        _between,
    ),
    (re.compile(rf"{_COLUMN} ?(?P<sign><=|>=|<|>) ?(?P<amount>{_NUMBER})"), _compared),
    (re.compile(r"dedup(?: exact)?"), _exact),
    (re.compile(r"dedup near(?: (?P<amount>\d*\.?\d+))?"), _near),
    (re.compile(rf"budget (?P<amount>\d[\d_,]*)(?: by {_COLUMN})?"), _budget),
)
