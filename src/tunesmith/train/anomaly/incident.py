"""Incident records: the rows of a bad step, their text and the loss of each target, from all
ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.distributed.world import World
from tunesmith.train.path_hash import document_target_keys, target_keys
from tunesmith.train.step import StepResult
from tunesmith.types import Document

Decode = Callable[[Iterable[int]], str]

SINGLE_WORLD = World()
MOST = 100
"""Incident folders that a run keeps; later ones are counted only."""


def save_incident(
    folder: Path,
    step: int,
    *,
    documents: Sequence[Document],
    result: StepResult,
    decode: Decode,
    said: Mapping[str, Any] | None = None,
    world: World = SINGLE_WORLD,
) -> Path | None:
    """Write `incident-STEP/rows.json` for a step counted from 1, worst rows first; numbers that
    are not finite are written as text. None if there are `MOST` of them or the disk does not take
    it: that must not hide what happened.

    Every rank comes here with the losses of its own micro-batches, and the first writes them all;
    each row names the ranks that worked on it. `said` is put at the front.
    """
    losses = _losses_by_path(result, world)
    if not world.is_main:
        return folder / f"incident-{step}"
    place = folder / f"incident-{step}"
    if not place.exists() and sum(1 for _ in folder.glob("incident-*")) >= MOST:
        return None
    rows = [
        {**entry, **_contents(document, number, losses, decode)}
        for number, document, entry in ranked(documents, result)
    ]
    record = {
        "step": step,
        "loss": number_or_text(result.loss),
        "grad_norm": number_or_text(result.grad_norm),
        **(said or {}),
        "rows": rows,
    }
    try:
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False)
        (place / "rows.json").write_text(text, encoding="utf-8")
    except OSError:
        return None
    return place


def ranked(
    documents: Sequence[Document], result: StepResult
) -> list[tuple[int, Document, dict[str, Any]]]:
    """Number, document and losses of each document of a step: those that are not finite first,
    then by falling mean loss.
    """
    found: list[tuple[tuple[bool, float], int, dict[str, Any]]] = []
    pairs = zip(result.document_loss.tolist(), result.document_weight.tolist(), strict=True)
    for number, (loss, weight) in enumerate(pairs):
        mean = loss / weight if weight else 0.0
        entry = {
            "row": str(documents[number].origin),
            "loss": number_or_text(mean),
            "loss_sum": number_or_text(loss),
            "weight_sum": weight,
        }
        finite = math.isfinite(mean)
        found.append(((finite, -mean if finite else 0.0), number, entry))
    found.sort(key=lambda item: (item[0], item[1]))
    return [(number, documents[number], entry) for _, number, entry in found]


def number_or_text(value: float) -> float | str:
    """The number, or `nan`, `inf` or `-inf`, which JSON doesn't have."""
    return value if math.isfinite(value) else str(value)


def _losses_by_path(result: StepResult, world: World) -> dict[int, tuple[float, int]]:
    """The loss of each target and the rank that computed it, by the key of the path that the target
    ends; those of all ranks on the first.
    """
    local: list[tuple[np.ndarray, np.ndarray]] = [
        (target_keys(plan), losses.float().cpu().numpy())
        for plan, losses in result.micro_losses
        if len(plan.owners.weight)  # none asked for those of a micro-batch that fills a rank's time
    ]
    found: dict[int, tuple[float, int]] = {}
    for rank, parts in enumerate(world.gather_object(local)):
        for keys, losses in parts:
            each = zip(keys.tolist(), losses.tolist(), strict=True)
            found.update((key, (loss, rank)) for key, loss in each)
    return found


def _contents(
    document: Document, number: int, losses: Mapping[int, tuple[float, int]], decode: Decode
) -> dict[str, Any]:
    keys = iter(document_target_keys(document))
    targets: list[dict[str, Any]] = []
    ranks: set[int] = set()
    for place, segment in enumerate(document.segments):
        for index, weight in zip(segment.index.tolist(), segment.weight.tolist(), strict=True):
            loss, rank = losses.get(next(keys), (None, None))
            ranks |= set() if rank is None else {rank}
            token = int(segment.ids[index])
            targets.append(
                {
                    "segment": place,
                    "index": index,
                    "id": token,
                    "text": decode([token]),
                    "weight": weight,
                    "loss": None if loss is None else number_or_text(loss),
                }
            )
    return {
        "document": number,
        "ranks": sorted(ranks),
        "parents": [segment.parent for segment in document.segments],
        "ids": [segment.ids.tolist() for segment in document.segments],
        "text": [decode(segment.ids.tolist()) for segment in document.segments],
        "targets": targets,
    }
