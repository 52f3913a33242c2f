"""What a step whose numbers went wrong leaves behind: its rows and the loss of each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from tunesmith.train.step import StepResult
from tunesmith.types import Document


def save_incident(
    folder: Path, step: int, *, documents: Sequence[Document], result: StepResult
) -> Path:
    """Write `incident-STEP/rows.json` for a step counted from 1; numbers that are not finite are
    written as text.
    """
    place = folder / f"incident-{step}"
    place.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "row": str(document.origin),
            "loss_sum": _number(float(loss)),
            "weight_sum": _number(float(weight)),
            "ids": [segment.ids.tolist() for segment in document.segments],
        }
        for document, loss, weight in zip(
            documents, result.document_loss, result.document_weight, strict=True
        )
    ]
    record = {"step": step, "grad_norm": _number(result.grad_norm), "rows": rows}
    (place / "rows.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return place


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
