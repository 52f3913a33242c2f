"""`tunesmith select`: data selection by rules on scores, duplicates and token budgets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.inputs import DataOption
from tunesmith.cli.score import check_output
from tunesmith.display import put
from tunesmith.errors import InputError, RecipeError

if TYPE_CHECKING:
    from tunesmith.data.sources.sources import Source
    from tunesmith.scoring.select import Selection


def select(
    scores: Annotated[
        list[Path], typer.Argument(metavar="SCORES...", help="Files from `tunesmith score`.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The JSON Lines file to write.")],
    data: DataOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="RULE",
            help="A rule: 'top 10% by ifd', 'loss between 5% and 95%', 'ifd < 1', 'dedup', "
            "'dedup near 0.8', 'budget 100000'. Repeat it: rules apply in the given order.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files if they exist.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print totals and steps as one JSON object.")
    ] = False,
) -> None:
    """Write the rows that the rules keep, unchanged and in their order, and a ledger."""
    from tunesmith.scoring.select import apply_rules, gather, parse_rules
    from tunesmith.scoring.table import read_scores
    from tunesmith.scoring.write_selection import ledger_of, write_ledger, write_rows

    ledger_file = out.with_name(f"{out.stem}.ledger.json")
    for path in (out, ledger_file):
        check_output(path, overwrite=overwrite)
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise InputError(
            "rows are written as JSON Lines, so the name must end in .jsonl",
            where=str(out),
            hint="--out X.jsonl",
        )
    if not keep:
        raise RecipeError("there is no rule", where="--keep", hint="--keep 'top 50% by ifd'")
    sources = _sources(data or ())
    _check_not_input(out, sources)
    read = [read_scores(path) for path in scores]
    selection = gather(sources, read)
    selection = apply_rules(selection, parse_rules(keep, selection.pool))
    record = ledger_of(selection)
    if not len(selection.kept):
        raise InputError(
            f"the rules keep none of the {record['totals']['rows']:,} rows",
            where=_last_step(selection),
            hint="nothing was written; make a rule less strict",
        )
    digest = write_rows(out, selection)
    origin = [{"path": str(file.path), "sha256": _hash(file.path), **file.about} for file in read]
    written = {"path": str(out), "sha256": digest, "rows": len(selection.kept)}
    write_ledger(ledger_file, {"out": written, **record, "scores": origin})
    if as_json:
        shown = {"out": written, "totals": record["totals"], "steps": record["steps"]}
        put(json.dumps(shown, ensure_ascii=False))
    else:
        _print_steps(record, out, ledger_file)


def _sources(paths: Sequence[str]) -> list[Source]:
    from tunesmith.build.sources import make_sources
    from tunesmith.config.read import read_recipe

    if not paths:
        raise RecipeError("no data to select from", where="--data", hint="give --data FILE")
    recipe = read_recipe({"model": {"name": "none"}, "data": {"train": list(paths)}}, [])
    return make_sources(recipe.data.train, recipe.data)


def _check_not_input(out: Path, sources: Sequence[Source]) -> None:
    """Refuse to overwrite the data that is read."""
    for source in sources:
        if source.path is not None and out.exists() and out.samefile(source.path):
            raise InputError(
                "is an input file", where=str(out), hint="give another file with --out"
            )


def _last_step(selection: Selection) -> str | None:
    """The step that left out the last row."""
    texts = [step.text for step in selection.steps if step.rows]
    return texts[-1] if texts else None


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _print_steps(record: dict[str, Any], out: Path, ledger_file: Path) -> None:
    totals = record["totals"]
    rows, tokens = totals["rows"], totals["target_tokens"]
    width = max(len(name) for name in ("rows left", *(s["step"] for s in record["steps"])))
    put(f"{'':<{width}}  {'left out':>10}  {'rows left':>10}  {'target tokens':>14}")
    put(f"{'data':<{width}}  {'':>10}  {rows:>10,}  {tokens:>14,}")
    for step in record["steps"]:
        rows -= step["rows_left_out"]
        tokens -= step["target_tokens_left_out"]
        line = f"{step['step']:<{width}}  {step['rows_left_out']:>10,}  {rows:>10,}  {tokens:>14,}"
        notes = []
        if "from" in step:
            notes.append(f"from {step['from']:.4g} to {step['to']:.4g}")
        if step["without_value"]:
            notes.append(f"{step['without_value']:,} of them have no value")
        put(line + (f"  ({'; '.join(notes)})" if notes else ""))
    put(f"wrote {out}; {ledger_file} lists the rows that were left out")
