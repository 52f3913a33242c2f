"""The schema of `state.json` in a checkpoint: types and bounds of what a resume takes over.

Checksums find what a disk damaged. They find nothing in a file that was written anew together with
its manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

_COUNTS = ("world_size", "context_parallel", "tensor_parallel", "threads", "micro_tokens_asked")
_MOST = 2**53


def state_fault(state: Any, *, step: int) -> str | None:
    """What is wrong with the value of the file of step `step`; None if nothing is."""
    if not isinstance(state, Mapping):
        return "it is not a JSON object"
    found = cast("Mapping[str, Any]", state)
    if found.get("step") != step or isinstance(found.get("step"), bool):
        return f"its step is {str(found.get('step'))[:40]}, and its folder is of step {step}"
    rng, meta = found.get("rng"), found.get("meta")
    if not isinstance(rng, Mapping) or not isinstance(meta, Mapping):
        return "rng or meta is missing or of another type"
    if not ("numpy" in rng and "python" in rng):
        return "rng lacks a generator's state"
    return _meta_fault(cast("Mapping[str, Any]", meta), step)


def _meta_fault(meta: Mapping[str, Any], step: int) -> str | None:
    for key in _COUNTS:
        if key in meta and not _is_count(meta[key], least=1):
            return f"meta.{key} is no count"
    if "micro_tokens" in meta and not _is_count(meta["micro_tokens"], least=1):
        return "meta.micro_tokens is no count"
    if not isinstance(meta.get("owed_evaluation", False), bool):
        return "meta.owed_evaluation is neither true nor false"
    best = meta.get("best")
    if best is None:
        return None
    if not isinstance(best, Mapping):
        return "meta.best is of another type"
    at, loss = (cast("Mapping[str, Any]", best).get(key) for key in ("step", "nll"))
    if not (isinstance(at, int | float) and 0 <= at <= step):
        return "meta.best.step is not a step up to this one"
    if isinstance(loss, bool) or not isinstance(loss, int | float) or math.isnan(loss):
        return "meta.best.nll is no number"
    return None


def _is_count(value: Any, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _MOST
