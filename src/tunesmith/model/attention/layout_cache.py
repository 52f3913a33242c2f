"""A cache of values derived from a layout, shared by all layers of its micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from tunesmith.types import Layout

Made = TypeVar("Made")


class LayoutCache(Generic[Made]):
    """The last `most` that were made, by the layout itself and a key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[tuple[Layout, Hashable, Made]] = []

    def get(self, layout: Layout, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was made of this layout for this key, or `make` now."""
        for kept, under, made in self._kept:
            if kept is layout and under == key:
                return made
        made = make()
        self._kept.append((layout, key, made))
        del self._kept[: -self._most]
        return made
