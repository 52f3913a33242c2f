"""`tunesmith doctor`: a report of problems in the data and the chat template before a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.cli.inputs import (
    Arguments,
    DataOption,
    EvalOption,
    ModelOption,
    folders_of,
    recipe_from_arguments,
)
from tunesmith.display import put, shown
from tunesmith.doctor.outcome import LEVELS, Finding

if TYPE_CHECKING:
    from tunesmith.doctor.examine import Diagnosis

_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "error": "bold red"}
_EXAMPLES = 2


def doctor(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval: EvalOption = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Check only the first rows of each file.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 on warnings too, not only on errors.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False,
) -> int:
    """Check the data without training; loads the tokenizer, no weights.

    Returns 0, or 1 if a check finds an error (with `strict`, an error or a warning).
    """
    from tunesmith.cli.preview import open_template
    from tunesmith.doctor.catalogue import worst
    from tunesmith.doctor.examine import diagnose

    recipe = recipe_from_arguments(arguments, model, data, eval)
    found = diagnose(
        recipe, open_template(recipe, dated=True), folders=folders_of(arguments), rows=rows
    )
    if as_json:
        put(json.dumps(record(found), ensure_ascii=False, indent=1))
    else:
        show(found)
    return 1 if worst(found.findings) in (("error", "warning") if strict else ("error",)) else 0


def record(found: Diagnosis) -> dict[str, object]:
    """The report as a JSON object with `level`, `summary` and `checks`."""
    from tunesmith.doctor.catalogue import worst

    return {
        "level": worst(found.findings),
        "summary": found.summary,
        "checks": [finding.record() for finding in found.findings],
    }


def show(found: Diagnosis, console: Console | None = None) -> None:
    """Print the summary, then a line for each check, the worst first, with examples and a hint.

    In a terminal long lines are cut and hints are wrapped. Elsewhere, as in a file, they are not.
    """
    console = console or Console(highlight=False)
    whole = not console.is_terminal
    cut: dict[str, Any] = (
        {"soft_wrap": True} if whole else {"no_wrap": True, "overflow": "ellipsis"}
    )
    for name, text in _summary_lines(found.summary):
        console.print(_under(Text(shown(text)), name, whole=whole), soft_wrap=whole)
    console.print()
    widest = max(len(finding.title) for finding in found.findings)
    for finding in sorted(found.findings, key=lambda finding: -LEVELS.index(finding.level)):
        console.print(_line(finding, widest), **cut)
        if finding.level == "ok":
            continue
        for hit in finding.examples[:_EXAMPLES]:
            console.print(Text(f"{'':9}{shown(hit.where)}: {shown(hit.text)}", style="dim"), **cut)
        console.print(
            _under(Text(f"hint: {shown(finding.hint)}"), "", whole=whole), soft_wrap=whole
        )
    console.print()
    console.print(_verdict(found))


def _under(text: Text, name: str, *, whole: bool) -> Text | Table:
    """The text in a column beside its name, wrapped within that column unless `whole`."""
    label = Text(f"{name:<9}", style="bold")
    if whole:
        return label + text
    grid = Table.grid()
    grid.add_column(width=9)
    grid.add_column()
    grid.add_row(label, text)
    return grid


def _line(finding: Finding, widest: int) -> Text:
    line = Text(f"{finding.level:<9}", style=_STYLES[finding.level])
    if finding.level == "ok":
        line.append(f"{finding.title:<{widest}}  0 of {finding.of:,} {finding.unit}", style="dim")
        return line
    share = f" ({_percent(finding.share)})" if finding.of > 1 else ""
    line.append(f"{finding.title:<{widest}}", style="bold")
    line.append(f"  {finding.count:,} of {finding.of:,} {finding.unit}{share}", style="default")
    return line


def _verdict(found: Diagnosis) -> Text:
    counts = Counter(finding.level for finding in found.findings)
    words = [
        f"{counts[level]} {name if counts[level] == 1 else name + 's'}"
        for level, name in (("error", "error"), ("warning", "warning"), ("info", "note"))
    ]
    level = next((level for level in reversed(LEVELS) if counts[level]), "ok")
    return Text(f"{', '.join(words)}; {counts['ok']} checks passed", style=_STYLES[level])


def _summary_lines(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    rows = f"{values['rows']:,}, {values['trained_rows']:,} of them used in training"
    held = ", ".join(f"{count:,} {name}" for name, count in values["held_out"].items())
    yield "rows", f"{rows}; held out: {held or 'none'}"
    yield "shape", ", ".join(f"{count:,} {name}" for name, count in values["shapes"].items())
    if values["roles"]:
        roles = ", ".join(f"{count:,} {role}" for role, count in values["roles"].items())
        turns = values["turns"]
        range_text = (
            f"{turns['least']} to {turns['most']} answers in a chat, {turns['mean']:.1f} on average"
        )
        tools = f"; {values['rows_with_tools']:,} rows with tools" * bool(values["rows_with_tools"])
        yield "turns", f"{roles}; {range_text}{tools}"
    yield "length", f"{_range_text(values['length'])}; max_length {values['max_length']}"
    yield "targets", _range_text(values["targets"])
    share = values["target_tokens"] / values["tokens"] if values["tokens"] else 0.0
    yield (
        "tokens",
        f"{values['tokens']:,} in an epoch, {values['target_tokens']:,} ({share:.0%}) of them "
        f"targets; {values['shared_prefix_share']:.0%} are not computed, since rows share prefixes",
    )
    yield "steps", f"{values['steps_per_epoch']:,} in an epoch, {values['total_steps']:,} in all"


def _range_text(found: dict[str, int]) -> str:
    return "  ".join(f"{name} {count:,}" for name, count in found.items()) or "none"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2%}"
