"""The names of the files in a run folder."""

from __future__ import annotations

from pathlib import Path


def run_files(folder: Path) -> dict[str, Path]:
    """Paths of what a run leaves behind, by what they are."""
    names = {
        "recipe": "recipe.yaml",
        "machine": "machine.json",
        "ledger": "ledger.json",
        "metrics": "metrics.jsonl",
        "rows": "rows.parquet",
        "samples": "samples.jsonl",
        "objective": "objective.py",
        "faults": "faults.jsonl",
        "model": "model",
        "report": "report.html",
        "checkpoints": "checkpoints",
    }
    return {name: folder / file for name, file in names.items()}
