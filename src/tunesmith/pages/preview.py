"""The page of `tunesmith preview --html`: every row as it will be learned, beside what it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.data.formats.detect import detect_format, to_example
from tunesmith.data.formats.examples import Chat
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.data.row_errors import RowError
from tunesmith.pages.html import page, table, text
from tunesmith.pages.preview_style import SCRIPT, STYLE
from tunesmith.pages.tokens import TokenTexts, TurnText, document_tree

if TYPE_CHECKING:
    from tunesmith.data.rendering.render import Rendered
    from tunesmith.data.templates.template import Template
    from tunesmith.types import Origin

STATUSES = ("trained", "truncated", "dropped", "refused")
"""`refused` are rows that stop a run under the policies in force."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row, what became of it, and who speaks in it."""

    origin: Origin
    values: Mapping[str, Any] | None
    result: Rendered
    refused: bool = False
    turns: Sequence[TurnText] = ()

    @property
    def status(self) -> str:
        """One of STATUSES."""
        return "refused" if self.refused else self.result.status


def preview_page(
    rows: Iterable[ShownRow],
    template: Template,
    *,
    ledger: Ledger,
    settings: Mapping[str, str],
    more: bool = False,
) -> str:
    """The page. `ledger` counts exactly the rows that are shown; `settings` are named in its head;
    `more`: the data has rows that are not shown.
    """
    texts = TokenTexts(template)
    seen: dict[str, int] = dict.fromkeys(STATUSES, 0)
    items: list[str] = []
    for number, row in enumerate(rows):
        seen[row.status] += 1
        items.append(_row(row, number, texts))
    body = "".join(_head(ledger, settings, seen, more=more))
    listed = f'<main><ol id="rows" aria-label="rows">{"".join(items)}</ol></main>'
    status = (
        '<div id="token" role="status" aria-live="polite">'
        "Point at a token, or go to it with the arrow keys, to see its id.</div>"
    )
    return page("What will be learned", body + listed + status, style=STYLE, script=SCRIPT)


def turns_of(values: Mapping[str, Any] | None, *, templated: bool) -> list[TurnText]:
    """Role and text of each message of a row that is a chat, or becomes one."""
    kind = None if values is None else detect_format(values)
    if values is None or kind is None:
        return []
    try:
        example = to_example(values, format=kind, templated=templated)
    except RowError:
        return []
    if not isinstance(example, Chat):
        return []
    return [TurnText(turn.role, (turn.content or "").strip()) for turn in example.messages]


def _head(
    ledger: Ledger, settings: Mapping[str, str], seen: Mapping[str, int], *, more: bool
) -> Iterator[str]:
    yield "<h1>What will be learned</h1>"
    yield '<p class="faint">'
    yield " · ".join(f"{text(name)}: {text(value)}" for name, value in settings.items())
    yield "</p>"
    if more:
        rows = sum(seen.values())
        yield f"<p>The first {rows:,} rows; the data has more (<code>--rows N</code>).</p>"
    yield _summary(ledger)
    yield _reasons(ledger)
    yield _LEGEND
    yield _search(seen)


def _summary(ledger: Ledger) -> str:
    """The columns of the ledger, rows over tokens, one line a source and their sum."""
    sources = (
        {**ledger.sources, "all": ledger.totals} if len(ledger.sources) > 1 else ledger.sources
    )
    parts: list[str] = []
    for whole in ("rows", "tokens"):
        names = [n for n in asdict(ledger.totals) if n.startswith(whole + "_")]
        columns = ["source", whole, *(name.removeprefix(whole + "_") for name in names)]
        lines: list[list[object]] = [
            [source, *(f"{getattr(counts, name):,}" for name in (whole, *names))]
            for source, counts in sources.items()
        ]
        parts.append(table(f"{whole} of this page", columns, lines))
    return f"<h2>Ledger</h2>{''.join(parts)}"


def _reasons(ledger: Ledger) -> str:
    lines: list[list[object]] = [
        [reason, source, f"{len(entry.rows):,}", f"{entry.tokens:,}"]
        for source, reasons in ledger.reasons.items()
        for reason, entry in reasons.items()
    ]
    if not lines:
        return ""
    return table("what is not trained on, and why", ["reason", "source", "rows", "tokens"], lines)


_LEGEND = (
    '<section class="legend" aria-label="legend"><strong>Legend</strong>'
    '<span class="tokens"><i>context</i> read, not learned</span>'
    '<span class="tokens"><b>token</b> learned, weight 1</span>'
    '<span class="tokens"><b class="w1">token</b><b class="w2">token</b><b class="w3">token</b> '
    "weight below 1</span>"
    '<span class="tokens"><b class="w5">token</b> weight above 1</span>'
    '<span class="tokens"><i class="sp">token</i> special token</span>'
    '<span><span class="turn">role · number</span>a message begins</span>'
    "<span>indented: a branch that continues the segment above it</span>"
    "<span>⏎ newline, ∅ no text of its own, ⟨U+…⟩ a character that can't be seen</span></section>"
)


def _search(seen: Mapping[str, int]) -> str:
    ticks = "".join(
        f'<label><input type="checkbox" value="{status}" checked> {status} ({count:,})</label>'
        for status, count in seen.items()
        if count
    )
    return (
        '<header><form id="search" role="search" hidden>'
        '<label for="find">Row number, file:row or text (key /)<br>'
        '<input type="search" id="find" autocomplete="off" spellcheck="false"></label>'
        f'<fieldset aria-label="outcome">{ticks}</fieldset>'
        '<span id="shown" role="status" aria-live="polite"></span></form></header>'
    )


def _row(row: ShownRow, number: int, texts: TokenTexts) -> str:
    result, status = row.result, row.status
    document = result.document
    if document is None:
        rendered = f'<p class="reason">{text(result.reason or "")}</p>'
        counts = text(result.reason or "")
    else:
        cut = result.tokens - document.tokens - result.unused
        notes = [f"{document.tokens:,} tokens", f"{document.target_tokens:,} targets"]
        notes += [f"{len(document.segments):,} segments"] * (len(document.segments) > 1)
        notes += [f"{result.unused:,} unused after the last target"] * bool(result.unused)
        notes += [f"{cut:,} cut off: {result.reason}"] * (cut > 0)
        counts = text(", ".join(notes))
        rendered = document_tree(document, texts, row.turns)
    raw = json.dumps(row.values, ensure_ascii=False, indent=1, default=str)
    return (
        f'<li id="row-{number}" class="{status}" data-status="{status}" '
        f'data-source="{text(row.origin.source)}" data-row="{row.origin.row}"><details>'
        f'<summary><span class="status">{status}</span> <b>{text(row.origin)}</b> '
        f'<span class="faint">{counts}</span></summary>'
        f'<div class="both"><section aria-label="tokens">{rendered}</section>'
        f'<section aria-label="row"><pre tabindex="0">{text(raw)}</pre></section></div>'
        "</details></li>"
    )
