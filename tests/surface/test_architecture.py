"""Imports between modules go one way, and the picture in the documents shows them as they are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import grimp
import pytest
import tomllib

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "architecture.svg"
ANNOUNCING = {"tunesmith"}
"""The package itself names its public functions for type checkers, and imports them when asked."""

Edges = dict[str, set[str]]


def _graph(*, for_type_checkers: bool) -> grimp.ImportGraph:
    return grimp.build_graph(
        "tunesmith", exclude_type_checking_imports=not for_type_checkers, cache_dir=None
    )


def _edges(graph: grimp.ImportGraph) -> Edges:
    """The modules that each imports, at its top or inside of functions."""
    return {
        module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules
    }


def _cycles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one module, or of one that imports itself."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reached = {module: reachable(module) for module in edges}
    found = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in edges
        if module in reached[module]
    }
    return sorted((set(cycle) for cycle in found), key=sorted)


def _told(graph: grimp.ImportGraph, cycles: list[set[str]]) -> str:
    """The imports that make the cycles, a line each."""
    lines = []
    for number, cycle in enumerate(cycles, 1):
        lines.append(f"cycle {number} of {len(cycle)} modules")
        for importer in sorted(cycle):
            for imported in sorted(graph.find_modules_directly_imported_by(importer) & cycle):
                details = graph.get_import_details(importer=importer, imported=imported)
                places = ", ".join(str(detail["line_number"]) for detail in details)
                lines.append(f"  {importer}:{places} imports {imported}")
    return "\n".join(lines)


@pytest.mark.parametrize("for_type_checkers", [False, True], ids=["run", "type checkers"])
def test_no_modules_import_each_other(for_type_checkers: bool):
    graph = _graph(for_type_checkers=for_type_checkers)
    edges = _edges(graph)
    assert len(edges) > 200
    if for_type_checkers:
        edges = {name: set() if name in ANNOUNCING else others for name, others in edges.items()}
    cycles = _cycles(edges)
    assert not cycles, f"\n{_told(graph, cycles)}"


def test_cycles_are_found():
    edges: Edges = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": set(), "f": {"f"}}
    assert _cycles(edges) == [{"a", "b", "c"}, {"f"}]


def _layers() -> Iterator[tuple[str, list[list[str]]]]:
    """Of each contract on layers: the package, and the names below it, the highest layer first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in project["tool"]["importlinter"]["contracts"]:
        if contract["type"] == "layers":
            for container in contract.get("containers", ["tunesmith"]):
                names = [layer.split("|") for layer in contract["layers"]]
                yield (
                    container,
                    [[n.strip().removeprefix(f"{container}.") for n in layer] for layer in names],
                )


def test_no_import_goes_up_the_layers():
    edges = _edges(_graph(for_type_checkers=True))
    contracts = list(_layers())
    assert {"tunesmith", "tunesmith.data"} <= {container for container, _ in contracts}
    wrong = []
    for container, layers in contracts:
        level = {f"{container}.{n}": number for number, names in enumerate(layers) for n in names}
        depth = container.count(".") + 2

        def room(module: str, depth: int = depth) -> str:
            return ".".join(module.split(".")[:depth])

        wrong += [
            f"{importer} imports {imported}"
            for importer, others in edges.items()
            for imported in others
            if room(importer) in level and room(imported) in level
            if room(importer) != room(imported)
            if level[room(importer)] >= level[room(imported)]
        ]
    assert not wrong, "\n" + "\n".join(sorted(wrong))


def test_every_room_has_its_layer_and_its_sentence():
    for container, layers in _layers():
        folder = ROOT / "src" / Path(*container.split("."))
        there = {
            path.stem
            for path in folder.iterdir()
            if path.suffix == ".py" or (path / "__init__.py").is_file()
        }
        assert there - {"__init__"} == {name for layer in layers for name in layer}
        rooms = [path for path in folder.glob("*/__init__.py") if container == "tunesmith"]
        assert [path for path in rooms if not path.read_text("utf-8").startswith('"""')] == []


def test_picture_is_current():
    check = [sys.executable, str(ROOT / "docs" / "draw_architecture.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_picture_shows_every_room_once():
    texts = [
        element.text
        for element in ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")
        if element.get("class") == "name"
    ]
    rooms = next(layers for container, layers in _layers() if container == "tunesmith")
    wanted = [name for layer in rooms for name in layer if name != "__main__"]
    assert sorted(str(text).rstrip("/") for text in texts) == sorted(wanted)
