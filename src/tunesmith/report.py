"""HTML report of a run (report.html): one self-contained page, in which all text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.pages.html import page, text
from tunesmith.storage.atomic import write_text

_STYLE = "body{max-width:60rem}pre{background:var(--panel);padding:1rem;overflow:auto}"
_WIDTH, _HEIGHT = 720, 220


def write_report(
    path: Path,
    *,
    title: str,
    recipe: str,
    records: Sequence[Mapping[str, Any]],
    ledger: Mapping[str, Any],
) -> None:
    """Write the page: loss curves (SVG), evaluations, the last step, the ledger and the recipe."""
    steps = [record for record in records if record.get("kind") == "train"]
    evals = [record for record in records if record.get("kind") == "eval"]
    curves = {"training loss": [(r["step"], r["loss"]) for r in steps]}
    for record in evals:
        curves.setdefault(f"{record['set']} loss", []).append((record["step"], record["nll"]))
    body = [
        f"<h1>{text(title)}</h1>",
        _plot(curves),
        _table(
            "Evaluation",
            ["set", "step", "nll", "perplexity", "accuracy", "rows", "target_tokens"],
            evals,
        ),
        _table(
            "Last step",
            ["step", "epoch", "loss", "lr", "grad_norm", "tokens_per_second"],
            steps[-1:],
        ),
        f"<h2>Ledger</h2>{_tree(ledger)}",
        f"<h2>Recipe</h2><pre>{text(recipe)}</pre>",
    ]
    write_text(path, page(title, "".join(body), style=_STYLE))


def _table(title: str, columns: Sequence[str], records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    header = "".join(f"<th>{text(name)}</th>" for name in columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{text(_shown(record.get(name)))}</td>" for name in columns) + "</tr>"
        for record in records
    )
    return f"<h2>{text(title)}</h2><table><tr>{header}</tr>{rows}</table>"


def _tree(value: Any) -> str:
    """Nested values as nested HTML lists. Lists show 20 entries; ledger.json has all of them."""
    if isinstance(value, Mapping):
        items = "".join(f"<li>{text(str(key))}: {_tree(item)}</li>" for key, item in value.items())
        return f"<ul>{items}</ul>"
    if isinstance(value, list | tuple):
        items = "".join(f"<li>{_tree(item)}</li>" for item in value[:20])
        more = f"<li>and {len(value) - 20} more</li>" if len(value) > 20 else ""
        return f"<ul>{items}{more}</ul>"
    return text(_shown(value))


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _plot(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    points = [(x, y) for curve in curves.values() for x, y in curve if y is not None]
    if len(points) < 2:
        return ""
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    colours = ("#1f5fa8", "#c4572b", "#2f8f5b", "#7a4fa3")
    parts: list[str] = []
    for number, (name, curve) in enumerate(curves.items()):
        colour = colours[number % len(colours)]
        places = " ".join(
            f"{40 + (x - left) / max(right - left, 1e-9) * (_WIDTH - 60):.1f},"
            f"{20 + (high - y) / max(high - low, 1e-9) * (_HEIGHT - 40):.1f}"
            for x, y in curve
            if y is not None
        )
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{places}"/>'
        )
        parts.append(
            f'<text x="{_WIDTH - 20}" y="{24 + 16 * number}" fill="{colour}" '
            f'text-anchor="end">{text(name)}</text>'
        )
    parts.append(f'<text x="0" y="24" font-size="11">{high:.3g}</text>')
    parts.append(f'<text x="0" y="{_HEIGHT - 16}" font-size="11">{low:.3g}</text>')
    frame = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img"'
    return f"<h2>Loss</h2><svg {frame}>{''.join(parts)}</svg>"
