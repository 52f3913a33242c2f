"""Hang detection across ranks: a rank whose watchdog fired tells the others through the store,
so that each of them stops and writes its stacks.
"""

from __future__ import annotations

from threading import Thread

from tunesmith.distributed.env import call_with_timeout, shared_key, shared_store

HUNG = "hung"
_SECONDS = 4.0
"""How long the store may take to answer; its machine may be gone."""


class HangAlarm:
    """The alarm between the ranks of a run, a key in their store."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._poll: Thread | None = None
        self._heard: int | None = None

    def ring(self) -> None:
        """Tell the other ranks that this one hangs."""
        call_with_timeout(lambda: shared_store().set(shared_key(HUNG), str(self._rank)), _SECONDS)

    def heard(self) -> int | None:
        """The rank that rang; None if no rank did or if the store does not answer."""
        if self._poll is None or not self._poll.is_alive():
            self._poll = call_with_timeout(self._look, _SECONDS)
        return self._heard

    def _look(self) -> None:
        store, key = shared_store(), shared_key(HUNG)
        if store.check([key]):
            self._heard = int(store.get(key))
