"""The verification table as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tunesmith.storage.atomic import write_json, write_text
from tunesmith.verify.outcome import Outcome
from tunesmith.verify.verify import Verification

FILES = ("verify.md", "verify.json")


def keep(found: Verification, folder: Path) -> list[Path]:
    """Write verify.md and verify.json to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page, record = (folder / name for name in FILES)
    write_text(page, markdown(found))
    write_json(record, found.record())
    return [page, record]


def markdown(found: Verification) -> str:
    """The page: verdict, table, what each line compared, and on what."""
    lines = [
        f"# {verdict(found)}",
        "",
        f"Model {_text(found.model)}, data {_text(', '.join(found.data) or 'given in memory')}, "
        f"{found.about['time']}.",
        "",
        "| promise | | verdict | largest difference | allowed | counted |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in found.outcomes:
        cells = (
            outcome.promise, outcome.name, outcome.verdict, difference(outcome),
            number(outcome.tolerance), counts(outcome.counts),
        )  # fmt: skip
        lines.append(f"| {' | '.join(_text(cell) for cell in cells)} |")
    lines.append("")
    for outcome in found.outcomes:
        said = [f"{outcome.compared}; against {outcome.oracle}"]
        said += [text for text in (outcome.note, outcome.advice) if text]
        lines.append(f"- {outcome.promise} {outcome.name}: {_text('. '.join(said))}.")
    machine = found.about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    settings = ", ".join(f"{key} {value}" for key, value in found.about["settings"].items())
    lines += [
        "",
        f"Settings: {_text(settings)}.",
        "",
        f"Machine: {machine['cpu']}; {versions}.",
        "",
    ]
    return "\n".join(lines)


def verdict(found: Verification) -> str:
    """One line for the whole table."""
    failed = [f"{o.promise} {o.name}" for o in found.outcomes if o.failed]
    if failed:
        return f"{len(failed)} of {len(found.outcomes)} checks fail: {', '.join(failed)}"
    left = sum(outcome.verdict == "not checked" for outcome in found.outcomes)
    text = f"all {len(found.outcomes) - left} checks hold"
    return f"{text}, {left} not made" if left else text


def difference(outcome: Outcome) -> str:
    """The largest difference with its measure."""
    return f"{number(outcome.difference)} {outcome.measure}".strip()


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value == int_or_nan(value) and abs(value) < 1e6 else f"{value:.1e}"


def int_or_nan(value: float) -> float:
    """The whole number that a value is, or NaN."""
    return value if value.is_integer() else float("nan")


def counts(values: Mapping[str, int]) -> str:
    return ", ".join(f"{value:,} {name}" for name, value in values.items())


def _text(value: str) -> str:
    """Data's own text can't break the table."""
    return value.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
