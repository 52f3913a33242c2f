"""Terminal view of a rendered row (rich): targets stand between ⟦ and ⟧, coloured by weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from tunesmith.display import shown
from tunesmith.types import Document, Origin, Segment

if TYPE_CHECKING:
    from tunesmith.data.rendering.render import Rendered
    from tunesmith.data.templates.template import Template

OPEN, CLOSE = "⟦", "⟧"
LIGHT, FULL, HEAVY = "yellow", "bold green", "bold magenta"
LEGEND = f"{OPEN}learned{CLOSE} context"


def row_view(origin: Origin, result: Rendered, template: Template) -> Text:
    """The row's status and the text of all its segments."""
    view = Text()
    head = f"{origin}  {result.status}"
    if result.reason:
        head += f": {result.reason}"
    view.append(shown(head) + "\n", style="bold")
    document = result.document
    if document is None:
        return view
    view.append(_counts(document, result), style="dim")
    for number in range(len(document.segments)):
        if len(document.segments) > 1:
            view.append(_boundary(document, number) + "\n", style="cyan")
        view.append_text(segment_view(document.segments[number], template))
        view.append("\n")
    return view


def segment_view(segment: Segment, template: Template) -> Text:
    """The segment's text. Runs of targets of equal weight are marked; a weight other than 1 is
    shown.
    """
    weights = np.zeros(len(segment.ids), np.float32)
    weights[segment.index] = segment.weight
    cuts = np.flatnonzero(np.diff(weights)) + 1
    view = Text()
    for first, end in zip([0, *cuts], [*cuts, len(weights)], strict=True):
        text = shown(template.decode(segment.ids[first:end]))
        weight = float(weights[first])
        if weight == 0:
            view.append(text, style="dim")
            continue
        label = "" if weight == 1 else f"×{weight:g} "
        view.append(f"{OPEN}{label}{text}{CLOSE}", style=weight_style(weight))
    return view


def weight_style(weight: float) -> str:
    """The colour of a target with this weight."""
    return FULL if weight == 1 else LIGHT if weight < 1 else HEAVY


def _counts(document: Document, result: Rendered) -> str:
    parts = [
        f"{document.tokens} tokens in {_many(len(document.segments), 'segment')}",
        f"{document.target_tokens} targets",
        f"longest path {document.longest_path}",
    ]
    if result.unused:
        parts.append(f"{result.unused} unused after the last target")
    cut = result.tokens - document.tokens - result.unused
    if cut > 0:
        parts.append(f"{cut} cut off")
    return f"{', '.join(parts)}; {LEGEND}\n"


def _boundary(document: Document, number: int) -> str:
    """A line that names the segment's parent, indented by its depth in the tree."""
    segment = document.segments[number]
    depth, parent = 0, segment.parent
    while parent >= 0:
        depth, parent = depth + 1, document.segments[parent].parent
    relation = "a root" if segment.parent < 0 else f"continues {segment.parent}"
    size = _many(len(segment.ids), "token")
    return f"{'  ' * depth}── segment {number}: {relation}, from position {segment.start}, {size}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
