"""A layered drawing (Sugiyama, Tagawa and Toda 1981) of a directed graph as SVG.

Boxes stand on a grid, a row a layer. The order in a row is the one of all permutations that makes
arrows short and lets few cross. An arrow that passes rows runs in a lane between their boxes, and
arrows to the same box share their lane.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, MARGIN = 1040.0, 20.0
BOX_GAP, LANE_GAP = 30.0, 7.0  # between boxes, and between arrows that pass between them
ROW_GAP, GROUND_GAP = 52.0, 40.0
WIDEST_BOX, MOST_LINES, FEWEST_WORDS = 300.0, 4, 4
NAME_SIZE, TEXT_SIZE, LINE = 18, 13, 17.0
LETTER = 0.56  # width of a letter over its size, in the middle
CROSSING = 60.0  # length of an arrow that is worth a crossing

STYLE = """
  .page { fill: #ffffff; }
  .room { fill: #eef3fb; stroke: #5b7db1; }
  .ground { fill: #f1f1ee; stroke: #8b8b80; }
  .name { fill: #14233b; font-weight: 600; }
  .text { fill: #3a4658; }
  .arrow { stroke: #6c7a90; }
  .head { fill: #6c7a90; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; }
    .room { fill: #172338; stroke: #6f94cc; }
    .ground { fill: #20221f; stroke: #8f9187; }
    .name { fill: #e8effa; }
    .text { fill: #b9c4d4; }
    .arrow { stroke: #8796ad; }
    .head { fill: #8796ad; }
  }
"""

Edges = dict[str, set[str]]


@dataclass(frozen=True, order=True)
class Room:
    """What a box stands for."""

    name: str  # in the edges
    label: str
    text: str


def box_width(count: int) -> float:
    """Of each box of a row."""
    return min(WIDEST_BOX, (WIDTH - 2 * MARGIN - (count - 1) * BOX_GAP) / count)


def centres(row: list[Room]) -> dict[str, float]:
    """Where the boxes of a row stand."""
    step = box_width(len(row)) + BOX_GAP
    first = WIDTH / 2 - step * (len(row) - 1) / 2
    return {room.name: first + number * step for number, room in enumerate(row)}


def ordered(rows: list[list[Room]], edges: Edges) -> list[list[Room]]:
    """The rows with their rooms in the order that makes arrows short and lets few cross."""
    rows = [list(row) for row in rows]
    level = {room.name: number for number, row in enumerate(rows) for room in row}
    arrows = [(one, other) for one in sorted(edges) for other in sorted(edges[one])]
    for _ in range(4):
        for number, row in enumerate(rows):
            others = {r: x for line in rows if line is not row for r, x in centres(line).items()}
            rows[number] = min(
                map(list, itertools.permutations(sorted(row))),
                key=lambda order: _cost({**others, **centres(order)}, level, arrows),
            )
    return rows


def _cost(x: dict[str, float], level: dict[str, int], arrows: list[tuple[str, str]]) -> float:
    length = sum(abs(x[one] - x[other]) for one, other in arrows)
    crossings = 0
    for (a, b), (c, d) in itertools.combinations(arrows, 2):
        top, bottom = max(level[a], level[c]), min(level[b], level[d])
        if top < bottom:
            first = _at(x, level, (a, b), top) - _at(x, level, (c, d), top)
            last = _at(x, level, (a, b), bottom) - _at(x, level, (c, d), bottom)
            crossings += first * last < 0
    return length + CROSSING * crossings


def _at(x: dict[str, float], level: dict[str, int], arrow: tuple[str, str], row: int) -> float:
    """Where a straight arrow is at the height of a row."""
    one, other = arrow
    part = (row - level[one]) / (level[other] - level[one])
    return x[one] + part * (x[other] - x[one])


@dataclass(frozen=True)
class Box:
    """A room in the picture."""

    room: str
    label: str
    x: float  # of its middle
    y: float  # of its upper edge
    width: float
    height: float
    lines: tuple[str, ...]

    def svg(self, kind: str) -> str:
        left, name_y = self.x - self.width / 2, self.y + 25
        parts = [
            f'<rect class="{kind}" x="{left:.1f}" y="{self.y:.1f}" width="{self.width:.1f}" '
            f'height="{self.height:.1f}" rx="8"/>',
            _text(self.x, name_y, self.label, "name", NAME_SIZE),
        ]
        parts += [
            _text(self.x, name_y + 2 + LINE * (number + 1), line, "text", TEXT_SIZE)
            for number, line in enumerate(self.lines)
        ]
        return "\n".join(parts)


def _text(x: float, y: float, text: str, kind: str, size: int) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'


def wrapped(text: str, width: float) -> tuple[str, ...]:
    """The text in lines. Of a longer one stays what is before a colon, or as many parts of a list,
    or words, as fit.
    """
    lines = _lines(text, width)
    before, colon, after = text.partition(": ")
    if len(lines) <= MOST_LINES:
        return lines
    if colon and len(before.split()) >= FEWEST_WORDS:
        return wrapped(before, width)
    mark = "," if ", " in after else " "
    while len(lines := _lines(f"{text}{mark.strip()} …", width)) > MOST_LINES:
        text = text.rpartition(mark)[0].rstrip(",;:")
    return lines


def _lines(text: str, width: float) -> tuple[str, ...]:
    letters = int((width - 16) / (TEXT_SIZE * LETTER))
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) <= letters or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return tuple(lines)


def boxes_of(row: list[Room], y: float) -> list[Box]:
    """The boxes of a row, all as high as the highest."""
    width, x = box_width(len(row)), centres(row)
    lines = {room: wrapped(room.text, width) for room in row}
    height = 38 + LINE * max(map(len, lines.values()))
    return [Box(r.name, r.label, x[r.name], y, width, height, lines[r]) for r in row]


class Lanes:
    """Where arrows pass rows that they do not end in: between two boxes, or beside them all. Arrows
    to the same room share a lane.
    """

    def __init__(self, rows: list[list[Box]], edges: Edges) -> None:
        self._level = {box.room: number for number, row in enumerate(rows) for box in row}
        self._x = {box.room: box.x for row in rows for box in row}
        self.place: dict[tuple[int, str], float] = {}  # by row and the room where the lane ends
        for number, row in enumerate(rows):
            self._share_out(number, row, edges)

    def _share_out(self, number: int, row: list[Box], edges: Edges) -> None:
        step = row[0].width + BOX_GAP
        gaps = [row[0].x + (side - 0.5) * step for side in range(len(row) + 1)]
        chosen: dict[float, list[tuple[float, str]]] = {}
        for to, wish in self._wishes(number, edges):
            gap = min(gaps, key=lambda x: (abs(x - wish), x))
            chosen.setdefault(gap, []).append((wish, to))
        for gap, lanes in chosen.items():
            apart = min(LANE_GAP, (BOX_GAP - 10) / max(1, len(lanes) - 1))
            for place, (_, to) in enumerate(sorted(lanes)):
                self.place[number, to] = gap + apart * (place - (len(lanes) - 1) / 2)

    def _wishes(self, number: int, edges: Edges) -> list[tuple[str, float]]:
        """The lanes of a row, each with where its arrows would pass if they were straight."""
        wishes: dict[str, list[float]] = {}
        for one in sorted(edges):
            for to in sorted(edges[one]):
                if self._level[one] < number < self._level[to]:
                    at = _at(self._x, self._level, (one, to), number)
                    wishes.setdefault(to, []).append(at)
        return [(to, sum(places) / len(places)) for to, places in sorted(wishes.items())]


def arrows_of(rows: list[list[Box]], edges: Edges) -> list[str]:
    """The arrows, each piece between two rows drawn once."""
    boxes = {box.room: (number, box) for number, row in enumerate(rows) for box in row}
    lanes = Lanes(rows, edges).place
    out, into = _ports(boxes, edges, lanes)
    pieces: dict[str, None] = {}
    for one, to in sorted((room, other) for room in edges for other in edges[room]):
        (start, above), (end, below) = boxes[one], boxes[to]
        x, y = out[one, to], above.y + above.height
        for number in range(start + 1, end):
            row = rows[number][0]
            pieces[_curve(x, y, lanes[number, to], row.y, bottom=row.y + row.height)] = None
            x, y = lanes[number, to], row.y + row.height
        pieces[_curve(x, y, into[to, x], below.y - 1, head=True)] = None
    return list(pieces)


Ports = dict[tuple[str, str], float]


def _ports(
    boxes: dict[str, tuple[int, Box]], edges: Edges, lanes: dict[tuple[int, str], float]
) -> tuple[Ports, dict[tuple[str, float], float]]:
    """Where arrows leave a box, by both rooms, and where they enter one, by where
    they come from.
    """
    out: Ports = {}
    for one in edges:
        start, box = boxes[one]
        wished = {to: lanes.get((start + 1, to), boxes[to][1].x) for to in sorted(edges[one])}
        out |= {(one, to): x for to, x in _spread(box, wished).items()}
    into: dict[tuple[str, float], float] = {}
    for to, (end, box) in boxes.items():
        sources = {
            lanes.get((end - 1, to), out[one, to]) if boxes[one][0] < end - 1 else out[one, to]
            for one in edges
            if to in edges[one]
        }
        into |= {
            (to, x): place for x, place in _spread(box, {x: x for x in sorted(sources)}).items()
        }
    return out, into


def _spread(box: Box, wished: dict[Any, float]) -> dict[Any, float]:
    """Places on an edge of the box, in the order of where the other ends are."""
    order = sorted(wished, key=lambda key: (wished[key], key))
    step = min(24.0, (box.width - 40) / max(1, len(order) - 1))
    return {key: box.x + step * (n - (len(order) - 1) / 2) for n, key in enumerate(order)}


def _curve(
    x: float, y: float, to_x: float, to_y: float, *, bottom: float | None = None, head: bool = False
) -> str:
    middle = (y + to_y) / 2
    path = f"M{x:.1f} {y:.1f}C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
    path += "" if bottom is None else f"V{bottom:.1f}"
    end = ' marker-end="url(#head)"' if head else ""
    return f'<path class="arrow" d="{path}"{end}/>'


def drawing(
    rows: list[list[Room]], ground: list[Room], edges: Edges, *, title: str, note: str
) -> str:
    """The file: rows of boxes with arrows, the ground below without any, and a note."""
    y, drawn = MARGIN, []
    for row in ordered(rows, edges):
        drawn.append(boxes_of(row, y))
        y += drawn[-1][0].height + ROW_GAP
    parts = [*arrows_of(drawn, edges), *(box.svg("room") for row in drawn for box in row)]
    y += GROUND_GAP - ROW_GAP
    below = boxes_of(ground, y)
    parts += [box.svg("ground") for box in below]
    y += below[0].height + 26
    parts.append(_text(WIDTH / 2, y, note, "text", TEXT_SIZE))
    return _file(parts, y + 16, title)


def _file(parts: list[str], height: float, title: str) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" '
        'text-anchor="middle" role="img">\n'
        f"<title>{escape(title)}</title>\n"
        "<!-- Drawn by docs/draw_architecture.py from the imports. -->\n"
        f"<style>{STYLE}</style>\n"
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto"><path class="head" d="M0 1L9 5L0 9z"/></marker></defs>\n'
        f'<rect class="page" width="{WIDTH:.0f}" height="{height:.0f}" rx="10"/>\n'
        '<g fill="none" stroke-width="1.4">\n'
    )
    return head + "\n".join(parts) + "\n</g>\n</svg>\n"
