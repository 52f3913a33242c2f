"""The ledger: what became of every row and every token of the input (double-entry: columns add up).

A row is trained on, truncated, dropped or held out. A token of a row is a target, context,
truncated, dropped or unused. `check` verifies that the columns add up to the input.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.data.preprocess.holdout import HoldoutChoice
from tunesmith.data.row_errors import Field
from tunesmith.types import Origin

HELD_OUT = "held out for evaluation"
_EXAMPLES = 3


class LedgerError(AssertionError):
    """The columns don't add up, which is a bug of this program and never a fault of the data."""


@dataclass(slots=True)
class Totals:
    """Counts of rows and of tokens.

    Every row is counted in one of the row columns, every token of a rendered row in one of the
    token columns. Rows that could not be rendered, and held-out rows, have no tokens here.
    """

    rows: int = 0
    rows_trained: int = 0  # in full
    rows_truncated: int = 0  # trained on in part
    rows_dropped: int = 0
    rows_held_out: int = 0
    tokens: int = 0
    tokens_trained: int = 0  # targets
    tokens_context: int = 0  # seen by the model, but no target
    tokens_truncated: int = 0  # cut off a row that is trained on
    tokens_dropped: int = 0  # of dropped rows
    tokens_unused: int = 0  # of a trained row, after its last target

    def add(self, other: Totals) -> None:
        """Add the counts of another."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def check(self, place: str) -> None:
        """Raises LedgerError unless rows and tokens are the sums of their columns, none below 0."""
        for whole in ("rows", "tokens"):
            parts = {
                name: getattr(self, name) for name in self.__slots__ if name.startswith(whole + "_")
            }
            if getattr(self, whole) != sum(parts.values()) or min(parts.values()) < 0:
                raise LedgerError(f"ledger of {place}: {getattr(self, whole)} {whole}, but {parts}")


@dataclass(slots=True)
class Reason:
    """The rows of one source with the same reason: their numbers, and a few examples in words."""

    rows: list[int] = field(default_factory=list[int])
    tokens: int = 0
    examples: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class FieldCount:
    """The rows of one source in which a field holds something that is not read as it stands."""

    state: str  # unread | refused | mapped | ignored
    hint: str
    rows: int = 0
    first: list[int] = field(default_factory=list[int])


class Ledger:
    """Counts per source, and per source and reason all that is not trained on in full."""

    def __init__(self) -> None:
        self.sources: dict[str, Totals] = {}
        self.reasons: dict[str, dict[str, Reason]] = {}
        self.fields: dict[str, dict[str, FieldCount]] = {}  # by source and path
        self.holdout: dict[str, Any] | None = None
        self.plan: dict[str, Any] | None = None  # passes over each source in this run

    @property
    def totals(self) -> Totals:
        """The sum over all sources."""
        total = Totals()
        for counts in self.sources.values():
            total.add(counts)
        return total

    def add_trained(
        self, origin: Origin, *, tokens: int, targets: int, context: int, unused: int = 0
    ) -> None:
        """Enter a row that is trained on; tokens that are missing from the counts were
        truncated.
        """
        truncated = tokens - targets - context - unused
        counts = self.sources.get(origin.source)
        if counts is None:
            counts = self.sources[origin.source] = Totals()
        counts.rows += 1
        counts.rows_trained += not truncated
        counts.rows_truncated += truncated != 0
        counts.tokens += tokens
        counts.tokens_trained += targets
        counts.tokens_context += context
        counts.tokens_truncated += truncated
        counts.tokens_unused += unused

    def add_dropped(self, origin: Origin, *, tokens: int = 0) -> None:
        """Enter a row that is not trained on; a bad row has no tokens."""
        self._count(origin, Totals(rows=1, rows_dropped=1, tokens=tokens, tokens_dropped=tokens))

    def add_held_out(self, origin: Origin) -> None:
        """Enter a row that is held out for evaluation; its tokens are counted there."""
        self._count(origin, Totals(rows=1, rows_held_out=1))
        self.explain(origin, HELD_OUT)

    def take_back(
        self,
        origin: Origin,
        *,
        targets: int,
        context: int,
        reason: str,
        whole: bool,
        truncated: bool,
    ) -> None:
        """Enter targets and context of a row that packing removed.

        `whole`: nothing of the row is left. `truncated`: the row was truncated before.
        """
        counts = self.sources[origin.source]
        counts.tokens_trained -= targets
        counts.tokens_context -= context
        if truncated:
            counts.rows_truncated -= 1
        else:
            counts.rows_trained -= 1
        if whole:
            counts.rows_dropped += 1
            counts.tokens_dropped += targets + context
        else:
            counts.rows_truncated += 1
            counts.tokens_truncated += targets + context
        self.explain(origin, reason, tokens=targets + context)

    def relearn(self, source: str, *, targets: int) -> None:
        """Move tokens of a source from context to targets; a negative number moves them back."""
        self.sources[source].tokens_trained += targets
        self.sources[source].tokens_context -= targets

    def note_holdout(self, asked: str, choice: HoldoutChoice) -> None:
        """Enter the request for held-out rows, how many rows that is, and their hashes."""
        contents = sorted(digest.hex() for digest in choice.digests)
        self.holdout = {"asked": asked, "rows": choice.rows, "contents": contents}

    def explain(
        self, origin: Origin, reason: str, *, tokens: int = 0, detail: str | None = None
    ) -> None:
        """Enter the reason why tokens of a row (or the row itself, if it has none) are not trained
        on.
        """
        entry = self.reasons.setdefault(origin.source, {}).setdefault(reason, Reason())
        entry.rows.append(origin.row)
        entry.tokens += tokens
        if detail and len(entry.examples) < _EXAMPLES:
            entry.examples.append(f"{origin}: {detail}")

    def note_field(self, origin: Origin, field: Field) -> None:
        """Enter a field of a row that nothing reads, that was renamed, or that is ignored."""
        counts = self.fields.setdefault(origin.source, {})
        entry = counts.setdefault(field.path, FieldCount(field.state, field.hint))
        entry.rows += 1
        if len(entry.first) < _EXAMPLES:
            entry.first.append(origin.row)

    def merge(self, other: Ledger) -> None:
        """Add the rows of another ledger."""
        self.holdout = self.holdout or other.holdout
        for name, counts in other.sources.items():
            self.sources.setdefault(name, Totals()).add(counts)
        for name, fields in other.fields.items():
            for path, count in fields.items():
                same = FieldCount(count.state, count.hint)
                same = self.fields.setdefault(name, {}).setdefault(path, same)
                same.rows += count.rows
                same.first = (same.first + count.first)[:_EXAMPLES]
        for name, reasons in other.reasons.items():
            for reason, entry in reasons.items():
                mine = self.reasons.setdefault(name, {}).setdefault(reason, Reason())
                mine.rows.extend(entry.rows)
                mine.tokens += entry.tokens
                mine.examples = (mine.examples + entry.examples)[:_EXAMPLES]

    def check(self) -> None:
        """Raises LedgerError unless the columns of every source add up and every loss has a
        reason.
        """
        for name, counts in self.sources.items():
            counts.check(name)
            explained = sum(entry.tokens for entry in self.reasons.get(name, {}).values())
            lost = counts.tokens_truncated + counts.tokens_dropped + counts.tokens_unused
            if explained != lost:
                raise LedgerError(f"ledger of {name}: {lost} tokens lost, {explained} explained")
            reasons = sum(len(entry.rows) for entry in self.reasons.get(name, {}).values())
            if reasons < counts.rows_truncated + counts.rows_dropped + counts.rows_held_out:
                raise LedgerError(f"ledger of {name}: {reasons} reasons are too few for its rows")

    def to_dict(self) -> dict[str, Any]:
        """The ledger as plain values for JSON: `totals`, `sources`, `reasons`, `fields`, `holdout`,
        `plan`.
        """
        return {
            "holdout": self.holdout,
            "plan": self.plan,
            "totals": asdict(self.totals),
            "sources": {name: asdict(counts) for name, counts in self.sources.items()},
            "reasons": {
                name: {reason: asdict(entry) for reason, entry in reasons.items()}
                for name, reasons in self.reasons.items()
            },
            "fields": {
                name: {path: asdict(count) for path, count in fields.items()}
                for name, fields in self.fields.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ledger:
        """The ledger that `to_dict` wrote."""
        ledger = cls()
        ledger.holdout = values["holdout"]
        ledger.plan = values.get("plan")
        ledger.sources = {name: Totals(**counts) for name, counts in values["sources"].items()}
        ledger.reasons = {
            name: {reason: Reason(**entry) for reason, entry in reasons.items()}
            for name, reasons in values["reasons"].items()
        }
        ledger.fields = {
            name: {path: FieldCount(**count) for path, count in fields.items()}
            for name, fields in values.get("fields", {}).items()
        }
        return ledger

    def save(self, path: Path) -> None:
        """Write the ledger as JSON, atomically."""
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)

    @classmethod
    def load(cls, path: Path) -> Ledger:
        """The ledger that `save` wrote."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def _count(self, origin: Origin, counts: Totals) -> None:
        self.sources.setdefault(origin.source, Totals()).add(counts)
