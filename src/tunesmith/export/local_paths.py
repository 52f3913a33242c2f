"""Names of files and folders of this machine, which no file that can leave it may tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def is_local(text: str) -> bool:
    """True for a full path of this machine (its first folder exists here), or one of its user."""
    if text.startswith(("~", "file:")):
        return "/" in text
    parts = Path(text).parts if "\n" not in text else ()
    return len(parts) > 2 and Path(text).is_absolute() and Path(*parts[:2]).is_dir()


def public_name(text: str) -> str:
    """A name without the folders of this machine around it."""
    return Path(text).name if is_local(text) else text


def public(values: Any) -> Any:
    """Nested values, every text in them by its public name."""
    if isinstance(values, Mapping):
        return {public(key): public(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [public(value) for value in values]
    return public_name(values) if isinstance(values, str) else values


def public_yaml(text: str) -> str:
    """The same of YAML text; its own bytes where there is nothing to leave out."""
    values = yaml.safe_load(text)
    found = public(values)
    return text if found == values else yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def local_texts(values: Any) -> list[str]:
    """The full paths of this machine among nested values."""
    if isinstance(values, Mapping):
        return [found for pair in values.items() for found in local_texts(list(pair))]
    if isinstance(values, list | tuple):
        return [found for value in values for found in local_texts(value)]
    return [values] if isinstance(values, str) and is_local(values) else []
