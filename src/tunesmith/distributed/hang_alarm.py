"""A rank that no longer gets on tells the others, so that each leaves what it was doing."""

from __future__ import annotations

from threading import Thread

from tunesmith.distributed.env import call_with_timeout, shared_key, shared_store

HUNG = "hung"
_SECONDS = 4.0
"""How long the store may take to answer; its machine may be gone."""


class HangAlarm:
    """Between the ranks of a run, by way of their store."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._asking: Thread | None = None
        self._heard: int | None = None

    def ring(self) -> None:
        """Tell the others."""
        call_with_timeout(lambda: shared_store().set(shared_key(HUNG), str(self._rank)), _SECONDS)

    def heard(self) -> int | None:
        """The rank that rang, None if none did or the store doesn't answer."""
        if self._asking is None or not self._asking.is_alive():
            self._asking = call_with_timeout(self._look, _SECONDS)
        return self._heard

    def _look(self) -> None:
        store, key = shared_store(), shared_key(HUNG)
        if store.check([key]):
            self._heard = int(store.get(key))
