"""Renamed recipe keys and values: an error in a user's recipe, translated in a run's.

A user who writes an old name gets the new one in the error. A run folder keeps the names of the
version that wrote it, so whoever reads a run's recipe translates it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from tunesmith.config.document import Document

KEYS = {
    ("device", "context"): "context_parallel",
    ("device", "tensor"): "tensor_parallel",
    ("device", "prepare_processes"): "num_proc",
}
"""Section and old key to the new key of the same section."""

VALUES = {("device", "attention", "isolated"): "unpacked"}
"""Section, key and old value to the new value."""


def complain_of_old_names(document: Document) -> None:
    """Note a problem for each old name in a user's recipe, and put the new one in its place."""
    for (section, old), new in KEYS.items():
        held = document.data.get(section)
        if isinstance(held, dict) and old in held:
            value = cast("dict[str, Any]", held).pop(old)
            hint = f"write {section}.{new}={value}"
            document.complain((section, old), f"is called {section}.{new} now", hint)
    for (section, key, old), new in VALUES.items():
        held = document.data.get(section)
        if isinstance(held, dict) and cast("dict[str, Any]", held).get(key) == old:
            held[key] = new
            hint = f"write {section}.{key}={new}"
            document.complain((section, key), f"the value {old} is called {new} now", hint)


def translated(data: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a run in today's names, as a copy; anything else stays as it is."""
    found: dict[str, Any] = dict(data)
    for name, section in data.items():
        if isinstance(section, Mapping):
            found[name] = _translated(name, dict(cast("Mapping[str, Any]", section)))
    return found


def _translated(name: str, section: dict[str, Any]) -> dict[str, Any]:
    for (owner, old), new in KEYS.items():
        if owner == name and old in section:
            section[new] = section.pop(old)
    for (owner, key, old), new in VALUES.items():
        if owner == name and section.get(key) == old:
            section[key] = new
    return section
