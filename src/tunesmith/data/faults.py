"""What is wrong with one row: a value between stages, an exception inside the one that found it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row can't be trained on; `kind` is a stable slug to count by (`invalid-json`)."""

    kind: str
    message: str
    hint: str | None = None


class RowError(Exception):
    """A row is bad. `prepare` collects these, so none of them ever reaches the user as such."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault
