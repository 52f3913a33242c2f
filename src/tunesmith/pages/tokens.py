"""A document's tokens as HTML: its tree, its targets, and turn boundaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.pages.html import text
from tunesmith.types import Document, IntArray, Segment

if TYPE_CHECKING:
    from tunesmith.data.templates.template import Template

BROKEN = "\ufffd"
_LONGEST_CHARACTER = 8  # tokens that one character may be made of


@dataclass(frozen=True, slots=True)
class TurnText:
    """Who speaks in a message, and a text of it that the template writes as it is."""

    role: str
    content: str


@dataclass(slots=True)
class TokenTexts:
    """The text of each token as it stands after another, kept by id."""

    template: Template
    _known: dict[int, str] = field(default_factory=dict[int, str])
    _before: list[int] = field(default_factory=list[int])
    _length: int = 0

    def __post_init__(self) -> None:
        # Some decoders strip the space before a first token; behind another one it shows.
        self._before = self.template.encode(["a"])[0][-1:]
        self._length = len(self.template.decode(self._before))

    def of(self, token: int) -> str:
        """The token's own text."""
        found = self._known.get(token)
        if found is None:
            found = self.template.decode([*self._before, token])[self._length :]
            self._known[token] = found
        return found

    def cells(self, ids: IntArray) -> list[tuple[int, str]]:
        """(number of tokens, their text) in order; tokens of one character go together."""
        tokens = ids.tolist()
        cells: list[tuple[int, str]] = []
        at = 0
        while at < len(tokens):
            shown, size = self.of(tokens[at]), 1
            if BROKEN in shown:
                size, shown = self._joined(tokens[at : at + _LONGEST_CHARACTER], shown)
            cells.append((size, shown))
            at += size
        return cells

    def _joined(self, tokens: list[int], shown: str) -> tuple[int, str]:
        for size in range(2, len(tokens) + 1):
            together = self.template.decode([*self._before, *tokens[:size]])[self._length :]
            if BROKEN not in together:
                return size, together
        return 1, shown


def document_tree(document: Document, texts: TokenTexts, turns: Sequence[TurnText] = ()) -> str:
    """All segments as nested lists, each under the one that it continues."""
    children: dict[int, list[int]] = {}
    for number, segment in enumerate(document.segments):
        children.setdefault(segment.parent, []).append(number)
    spoken = [0] * len(document.segments)
    bodies: list[str] = []
    for number, segment in enumerate(document.segments):
        first = spoken[segment.parent] if segment.parent >= 0 else 0
        body, spoken[number] = _segment(segment, texts, turns, first)
        bodies.append(body)
    return _nested(document, bodies, children)


def _nested(document: Document, bodies: list[str], children: Mapping[int, list[int]]) -> str:
    """Markup of the tree, without recursion: a chat may branch at each of hundreds of turns."""
    parts: list[str] = []
    waiting: list[int | str] = ["</ul>", *reversed(children[-1])]
    parts.append('<ul class="tree">')
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            parts.append(item)
            continue
        parts.append(f"<li>{_heading(document, item)}{bodies[item]}")
        below = children.get(item, [])
        waiting.append("</ul></li>" if below else "</li>")
        if below:
            parts.append("<ul>")
            waiting.extend(reversed(below))
    return "".join(parts)


def _heading(document: Document, number: int) -> str:
    if len(document.segments) == 1:
        return ""
    segment = document.segments[number]
    hangs = "a root" if segment.parent < 0 else f"continues segment {segment.parent}"
    size = f"{len(segment.ids)} token{'' if len(segment.ids) == 1 else 's'}"
    return (
        f'<div class="edge">segment {number}: {hangs}, from position {segment.start}, {size}</div>'
    )


def _segment(
    segment: Segment, texts: TokenTexts, turns: Sequence[TurnText], spoken: int
) -> tuple[str, int]:
    """The segment's markup, and the number of the first turn that comes after it."""
    cells = texts.cells(segment.ids)
    weights = dict(zip(segment.index.tolist(), segment.weight.tolist(), strict=True))
    messages = dict(zip(segment.index.tolist(), segment.message.tolist(), strict=True))
    marks, spoken = _boundaries(cells, messages, turns, spoken)
    special = texts.template.special_ids
    parts: list[str] = []
    at = 0
    for size, shown in cells:
        if at in marks:
            parts.append(f'<span class="turn">{text(marks[at])}</span>')
        parts.append(_cell(shown, weights.get(at), size == 1 and int(segment.ids[at]) in special))
        at += size
    ids = " ".join(str(token) for token in segment.ids.tolist())
    sizes = " ".join(str(size) for size, _ in cells) if len(cells) < len(segment.ids) else ""
    sizes = f' data-sizes="{sizes}"' if sizes else ""
    return (
        f'<div class="tokens" tabindex="0" data-ids="{ids}"{sizes}>{"".join(parts)}</div>',
        spoken,
    )


def _cell(shown: str, weight: float | None, special: bool) -> str:
    """One token: <b> is learned, <i> is context; the weight is in the markup where it isn't 1."""
    inner = (
        text(shown).replace("\n", '<s aria-hidden="true">⏎</s>\n') or '<s aria-hidden="true">∅</s>'
    )
    kind = ["sp"] if special else []
    if weight is None:
        return f'<i class="sp">{inner}</i>' if kind else f"<i>{inner}</i>"
    level = _level(weight)
    if level != "w4":
        kind.append(level)
    classes = f' class="{" ".join(kind)}"' if kind else ""
    value = f' data-weight="{weight:g}"' if weight != 1 else ""
    return f"<b{classes}{value}>{inner}</b>"


def _level(weight: float) -> str:
    """The shade of a weight: w1 to w3 up to below 1, w4 is 1, w5 is above."""
    if weight == 1:
        return "w4"
    return "w5" if weight > 1 else f"w{1 + min(2, int(weight * 3))}"


def _boundaries(
    cells: Sequence[tuple[int, str]],
    messages: Mapping[int, int],
    turns: Sequence[TurnText],
    spoken: int,
) -> tuple[dict[int, str], int]:
    """Labels by the place of the token they stand before. Of learned turns the place is known; of
    others it is where their content is found in the text, and they have no label where it isn't.
    """
    begins: list[int] = []
    at = 0
    for size, shown in cells:
        begins.extend([at] * len(shown))
        at += size
    whole = "".join(shown for _, shown in cells)
    learned: dict[int, int] = {}
    for place, message in messages.items():
        learned.setdefault(message, place)
    marks: dict[int, str] = {}
    cursor = 0
    for number in range(spoken, len(turns)):
        if number in learned:
            place = learned[number]
            cursor = next((c for c, begin in enumerate(begins) if begin >= place), len(whole))
        else:
            found = whole.find(turns[number].content, cursor) if turns[number].content else -1
            if found < 0:
                continue
            place, cursor = begins[found], found + len(turns[number].content)
        marks[place] = f"{turns[number].role} · {number}"
        spoken = number + 1
    for message, place in learned.items():
        marks.setdefault(place, f"learned · {message}" if message >= 0 else "learned")
    return marks, spoken
