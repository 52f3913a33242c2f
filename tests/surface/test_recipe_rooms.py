"""The rooms below `build/` never see a recipe: no name in their source speaks of one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tunesmith

ROOT = Path(tunesmith.__file__).parent
ROOMS = (
    "train", "checkpoint", "metrics", "storage", "model", "data", "distributed", "optim",
    "objectives",
)  # fmt: skip
# The class of errors whose message points at a key; it holds no recipe.
ALLOWED = {"RecipeError"}


def names(source: str) -> Iterator[tuple[int, str]]:
    """Each identifier of a module, with its line."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.keyword(arg=str(name)) | ast.alias(name=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ImportFrom(module=str(name)):
                yield node.lineno, name
            case _:
                pass


def test_names_are_found():
    source = "from recipe import a\ndef recipe_of(recipe):\n    return recipe.x(recipe=1)\n"
    found = [name for _, name in names(source) if "recipe" in name]
    assert sorted(found) == ["recipe", "recipe", "recipe", "recipe", "recipe_of"]


@pytest.mark.parametrize("room", ROOMS)
def test_room_names_no_recipe(room: str):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in files
        for line, name in names(file.read_text(encoding="utf-8"))
        if "recipe" in name.lower() and name not in ALLOWED
    ]
    assert found == []
