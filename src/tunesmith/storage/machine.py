"""`machine.json` of a run, checked against its schema when it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tunesmith.errors import InputError
from tunesmith.storage.atomic import read_json

_SCHEMA: dict[str, type | tuple[type, ...]] = {
    "asked": dict,
    "template": dict,
    "data": dict,
    "eval": dict,
}
_OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "folder": (str, type(None)),
    "launch": (str, type(None)),
    "objective": (str, type(None)),
    "data_before": list,
}


def read_machine(run: Path) -> dict[str, Any]:
    """What the start of a run wrote, with the keys and types that others rely on.

    Raises:
        InputError: the file is missing, damaged, or was not written by a run.
    """
    path = run / "machine.json"
    values = read_json(path)
    fault = _fault(values)
    if fault is not None:
        raise InputError(
            f"was not written by a run, or is damaged: {fault}",
            where=str(path),
            hint="restore the file from a copy of the run, or start a new run from its recipe.yaml",
        )
    return cast("dict[str, Any]", values)


def _fault(values: Any) -> str | None:
    if not isinstance(values, dict):
        return "it is not a JSON object"
    found = cast("dict[str, Any]", values)
    for key, kind in _SCHEMA.items():
        if not isinstance(found.get(key), kind):
            return f"{key} is missing or of another type"
    for key, kind in _OPTIONAL.items():
        if key in found and not isinstance(found[key], kind):
            return f"{key} is of another type"
    if not isinstance(found["template"].get("sha256"), str):
        return "template.sha256 is missing or of another type"
    for key in ("data", "eval"):
        digests = cast("Mapping[str, Any]", found[key]).values()
        if not all(isinstance(digest, str | None) for digest in digests):
            return f"{key} holds something that is no hash"
    return None
