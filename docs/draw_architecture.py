"""Draw docs/architecture.svg, the picture of the rooms, from the project's own imports.

python docs/draw_architecture.py           # write it
python docs/draw_architecture.py --check   # exit 1 if it is not current

Rooms are the top-level folders and modules of the package. Their order is that of import-linter's
contract `layers` in pyproject.toml; what a room does is the first sentence of its docstring. Arrows
are imports, found by grimp, without those for type checkers. An arrow is left out where a longer
way of arrows leads to the same room (the transitive reduction), and none goes to the ground: the
modules of the lowest layers, which every room may import.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import grimp
import tomllib
from layered_drawing import Edges, Room, drawing

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGE = "tunesmith"
MOST_IN_A_ROW = 6
TITLE = "The rooms of Tunesmith and what they import"
NOTE = (
    "An arrow means: imports. One that follows from others is left out. "
    "Every room may import those of the last row."
)


def layers() -> list[list[str]]:
    """The rooms by layer, the highest first; `__main__` is left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    contract = next(one for one in contracts if one["name"] == "layers")
    found = [
        [name.strip().removeprefix(f"{PACKAGE}.") for name in layer.split("|")]
        for layer in contract["layers"]
    ]
    return [layer for layer in found if layer != ["__main__"]]


def imports(found: list[list[str]]) -> Edges:
    """The rooms of lower layers that each room imports; others are for import-linter to refuse."""
    level = {room: number for number, layer in enumerate(found) for room in layer}
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    edges: Edges = {room: set() for room in level}
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            one, other = room_of(importer), room_of(imported)
            if one in level and other in level and level[one] < level[other]:
                edges[one].add(other)
    return edges


def room_of(module: str) -> str:
    """`model` of `tunesmith.model.load`; the package itself is no room."""
    return f"{module}.".split(".")[1]


def reduced(edges: Edges) -> Edges:
    """Without the edges that a longer way stands for."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += sorted(new)
        return seen

    return {
        room: {to for to in others if not any(to in reachable(by) for by in others - {to})}
        for room, others in edges.items()
    }


def first_sentence(room: str) -> str:
    """Of the room's docstring, without its full stop."""
    place = ROOT / "src" / PACKAGE / room
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0]
    return sentence.rstrip(".").replace("`", "")


def is_folder(room: str) -> bool:
    return (ROOT / "src" / PACKAGE / room).is_dir()


def rows_of(found: list[list[str]], edges: Edges) -> tuple[list[list[str]], list[str]]:
    """Rooms by row of the picture, and the ground. A layer stands beside the one above it where
    that does not import it.
    """
    last = max(number for number, layer in enumerate(found) if any(map(is_folder, layer)))
    rows: list[list[str]] = []
    for layer in found[: last + 1]:
        fits = rows and len(rows[-1]) + len(layer) <= MOST_IN_A_ROW
        if fits and not any(set(layer) & edges[room] for room in rows[-1]):
            rows[-1] = rows[-1] + layer
        else:
            rows.append(list(layer))
    return rows, [room for layer in found[last + 1 :] for room in layer]


def described(room: str) -> Room:
    return Room(room, f"{room}/" if is_folder(room) else room, first_sentence(room))


def picture() -> str:
    """The whole file."""
    found = layers()
    everything = imports(found)
    rows, ground = rows_of(found, everything)
    rooms = {room for row in rows for room in row}
    edges = reduced({room: everything[room] & rooms for room in rooms})
    return drawing(
        [[described(room) for room in row] for row in rows],
        [described(room) for room in ground],
        edges, title=TITLE, note=NOTE,
    )  # fmt: skip


def main() -> None:
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(picture(), encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != picture():
        sys.exit("docs/architecture.svg is not current: run `python docs/draw_architecture.py`")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    main()
