"""Writes a selection: the kept rows, unchanged, and a ledger of all rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.data.preprocess.ledger import LedgerError
from tunesmith.errors import RunError
from tunesmith.scoring.select import Selection, Step, raw_rows


def write_rows(path: Path, selection: Selection) -> str:
    """Write the kept rows as JSON Lines, whole or not at all; the sha256 of the file.

    Raises:
        RunError: it can't be written.
    """
    lines = (
        json.dumps(values, ensure_ascii=False, default=str) + "\n"
        for _, values in raw_rows(selection.pool, selection.kept)
    )
    return _write(path, (line.encode() for line in lines))


def write_ledger(path: Path, record: Mapping[str, Any]) -> None:
    """Write the selection's ledger."""
    _write(path, [json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"])


def _write(path: Path, blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"can't be written: {error.strerror or error}", where=str(path)) from error
    return digest.hexdigest()


def ledger_of(selection: Selection) -> dict[str, Any]:
    """What became of every row of the data: kept, or left out by which step. It adds up.

    Raises:
        LedgerError: it doesn't, which is a defect of this program.
    """
    pool = selection.pool
    per_source: list[dict[str, Any]] = []
    for number, source in enumerate(pool.sources):
        kept = pool.row[selection.kept[pool.source[selection.kept] == number]].tolist()
        out = {
            step.text if _alike(selection, step) == 1 else f"{place}. {step.text}": rows
            for place, step in enumerate(selection.steps)
            if (rows := [row for at, row in step.rows if at == number])
        }
        rows = sorted([*kept, *(row for found in out.values() for row in found)])
        if rows != list(range(len(rows))):
            raise LedgerError(f"selection from {source.name}: a row is counted twice or never")
        per_source.append(
            {
                "source": source.name,
                "sha256": pool.scored[number].sha256,
                "rows": len(rows),
                "kept": kept,
                "left_out": out,
            }
        )
    return {
        "totals": _totals(selection, per_source),
        "steps": _steps(selection),
        "data": per_source,
    }


def _alike(selection: Selection, step: Step) -> int:
    """How many steps have this one's text: a rule may be given twice."""
    return sum(other.text == step.text for other in selection.steps)


def _totals(selection: Selection, per_source: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    tokens = int(selection.pool.numbers["target_tokens"].sum())
    totals = {
        "rows": sum(found["rows"] for found in per_source),
        "rows_kept": len(selection.kept),
        "rows_left_out": sum(len(step.rows) for step in selection.steps),
        "target_tokens": tokens,
        "target_tokens_kept": selection.target_tokens,
        "target_tokens_left_out": sum(step.target_tokens for step in selection.steps),
    }
    for whole in ("rows", "target_tokens"):
        if totals[whole] != totals[f"{whole}_kept"] + totals[f"{whole}_left_out"]:
            raise LedgerError(f"selection: the {whole} don't add up: {totals}")
    return totals


def _steps(selection: Selection) -> list[dict[str, Any]]:
    return [
        {
            "step": step.text,
            "rows_left_out": len(step.rows),
            "target_tokens_left_out": step.target_tokens,
            "without_value": step.missing,
            **({"from": step.bounds[0], "to": step.bounds[1]} if step.bounds else {}),
        }
        for step in selection.steps
    ]
