"""Hints for unknown recipe keys: similar names, and the names that other trainers use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, cast

from pydantic import BaseModel

from tunesmith.config.schema import Recipe


@dataclass(frozen=True, slots=True)
class Foreign:
    """What another trainer's name is here: keys of the recipe, and a sentence where it splits."""

    keys: tuple[str, ...]
    note: str | None

    def __str__(self) -> str:
        return self.note or f"here it is {' or '.join(self.keys)}"


@cache
def known_keys() -> dict[str, tuple[str, ...]]:
    """Every section of the recipe with its keys."""
    return {
        name: tuple(cast("type[BaseModel]", info.annotation).model_fields)
        for name, info in Recipe.model_fields.items()
    }


@cache
def foreign_names() -> dict[str, Foreign]:
    """The table of names that other trainers use."""
    text = files("tunesmith.config").joinpath("foreign.json").read_text(encoding="utf-8")
    groups = cast("list[dict[str, Any]]", json.loads(text))
    return {
        name: Foreign(tuple(group.get("keys", ())), group.get("note"))
        for group in groups
        for name in group["names"]
    }


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like the name, if any is like it."""
    found = get_close_matches(name.lower(), list(candidates), n=1, cutoff=0.7)
    return found[0] if found else None


def meaning(name: str) -> Foreign | None:
    """What exactly this name is here: one of our own keys, or a name that other trainers use."""
    plain = name.lower().strip("-").replace("-", "_")
    keys = known_keys()
    section, _, key = plain.rpartition(".")
    if key in keys.get(section, ()):
        return Foreign((plain,), None)
    if plain in keys:
        return Foreign((plain,), None)
    owners = tuple(f"{owner}.{key}" for owner, names in keys.items() if key in names)
    if owners and not section:
        return Foreign(owners, None)
    return foreign_names().get(key)


def suggest(name: str, *, section: str | None = None) -> str | None:
    """A hint for an unknown name: a key of the section, of another one, or of another trainer."""
    plain = name.lower().strip("-").replace("-", "_")
    keys = known_keys()
    exact = meaning(plain)
    if section in keys and not exact and (close := nearest(plain, keys[section])):
        return f"did you mean {section}.{close}?"
    if plain in keys:
        return f"{plain} is a section of its own, at the left margin"
    if exact:
        return str(exact)
    ours = {key: f"{owner}.{key}" for owner, names in keys.items() for key in names}
    ours |= {full: full for full in ours.values()} | {owner: owner for owner in keys}
    if close := nearest(plain, ours):
        return f"did you mean {ours[close]}?"
    if close := nearest(plain, foreign_names()):
        return f"if {close} is meant: {foreign_names()[close]}"
    return None
