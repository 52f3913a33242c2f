"""P4: every row and token is accounted for, counted again independently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.build.job import Job
from tunesmith.build.sources import make_sources
from tunesmith.data.sources.sources import read_rows
from tunesmith.storage.atomic import read_json
from tunesmith.storage.run_folder import run_files
from tunesmith.verify.outcome import Outcome

COLUMNS = {
    "rows": ("trained", "truncated", "dropped", "held_out"),
    "tokens": ("trained", "context", "truncated", "dropped", "unused"),
}


def ledger_adds_up(job: Job, folders: Sequence[Path]) -> Outcome:
    """The ledger of the rows looked at against the files and the documents themselves."""
    ledger = job.data.prepared.ledger.to_dict()
    wrong = sums_wrong(ledger)
    read: Counter[str] = Counter()
    for source in make_sources(
        job.choices.recipe.data.train, job.choices.recipe.data, folders=folders
    ):
        read[source.name] += sum(1 for _ in read_rows(source))
    learned, targets = _counted(job)
    for name, counts in ledger["sources"].items():
        kept = counts["rows_trained"] + counts["rows_truncated"]
        facts = {
            "rows read": (counts["rows"], read[name]),
            "rows learned from": (kept, learned[name]),
            "targets": (counts["tokens_trained"], targets[name]),
        }
        wrong += [
            f"{name}: the ledger says {said} {what}, there are {found}"
            for what, (said, found) in facts.items()
            if said != found
        ]
    wrong += [f"{name}: not in the ledger" for name in read if name not in ledger["sources"]]
    return _line(
        "ledger",
        wrong,
        "the ledger's columns for the rows looked at",
        "rows read and targets of the documents, counted again",
        {"rows": sum(read.values()), "targets": sum(targets.values())},
    )


def run_ledger(run: Path) -> Outcome:
    """The ledger that a run has left: all its rows, and those that it says it learned from."""
    ledger = read_json(run_files(run)["ledger"])
    wrong = sums_wrong(ledger)
    seen = _rows_learned(run)
    for name, rows in seen.items():
        counts = ledger["sources"].get(name, {})
        kept = counts.get("rows_trained", 0) + counts.get("rows_truncated", 0)
        if len(rows) > kept:
            wrong.append(f"{name}: {len(rows)} rows were learned from, the ledger says {kept}")
    totals = ledger["totals"]
    return _line(
        "the run's ledger",
        wrong,
        "the sums of ledger.json",
        "its columns added again, and the rows in rows.parquet",
        {"rows": totals["rows"], "tokens": totals["tokens"]},
    )


def sums_wrong(ledger: Mapping[str, Any]) -> list[str]:
    """Sums of a ledger, as JSON values, that are not those of their parts."""
    wrong: list[str] = []
    places = {"all sources": ledger["totals"], **ledger["sources"]}
    for place, counts in places.items():
        for whole, parts in COLUMNS.items():
            found = [counts[f"{whole}_{part}"] for part in parts]
            if counts[whole] != sum(found) or min(found) < 0:
                wrong.append(f"{place}: {counts[whole]} {whole}, but the columns say {sum(found)}")
    for name, value in ledger["totals"].items():
        parts = [counts[name] for counts in ledger["sources"].values()]
        if value != sum(parts):
            wrong.append(f"all sources: {name} is {value}, their sum is {sum(parts)}")
    return wrong


def _counted(job: Job) -> tuple[Counter[str], Counter[str]]:
    """Documents and targets by source."""
    learned: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for number in range(len(job.data.documents)):
        document = job.data.documents[number]
        learned[document.origin.source] += 1
        targets[document.origin.source] += sum(len(s.index) for s in document.segments)
    return learned, targets


def _rows_learned(run: Path) -> dict[str, set[int]]:
    path = run_files(run)["rows"]
    if not path.is_file():
        return {}
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["source", "row"])
    found: dict[str, set[int]] = {}
    for name, row in zip(table["source"].to_pylist(), table["row"].to_pylist(), strict=True):
        found.setdefault(str(name), set()).add(int(row))
    return found


def _line(
    name: str, wrong: Sequence[str], compared: str, oracle: str, counts: Mapping[str, int]
) -> Outcome:
    return Outcome(
        promise="P4",
        name=f"{name} adds up",
        compared=compared,
        oracle=oracle,
        counts=counts,
        verdict="fails" if wrong else "holds",
        difference=float(len(wrong)),
        tolerance=0.0,
        measure="sums that differ",
        note="; ".join(wrong[:3]),
        advice="rows or tokens were lost: report it with the ledger and the first rows of the data"
        if wrong
        else "",
    )
