"""The result of a check: one line of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["holds", "fails", "not checked"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A promise, what was compared with what, and how it came out.

    `difference` is the largest that was seen, in `measure`, and `tolerance` what it may be; 0 asks
    for the same bits or ids.
    """

    promise: str  # P1 to P6
    name: str
    compared: str
    oracle: str
    counts: Mapping[str, int]
    verdict: Verdict
    difference: float | None = None
    tolerance: float | None = None
    measure: str = ""
    note: str = ""
    advice: str = ""  # what to do, where it fails

    @property
    def failed(self) -> bool:
        return self.verdict == "fails"

    def record(self) -> dict[str, Any]:
        """The line as JSON values; a difference that is not finite as text."""
        values = asdict(self)
        values["counts"] = dict(self.counts)
        if self.difference is not None and not math.isfinite(self.difference):
            values["difference"] = str(self.difference)
        return values


def judged(difference: float, tolerance: float) -> Verdict:
    """A difference that is no number fails."""
    return "holds" if difference <= tolerance else "fails"
