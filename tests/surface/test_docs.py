"""The documents are true where a machine can tell: links, commands, recipes, the reference."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tunesmith.cli.app import COMMANDS
from tunesmith.config.read import read_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RECIPES = sorted(ROOT.glob("examples/*.yaml"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [found[2] for found in FENCE.finditer(text) if found[1] == language]


def test_there_are_documents_to_check():
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {page.name for page in PAGES}
    assert len(RECIPES) >= 2


def test_recipe_reference_is_current():
    check = [sys.executable, str(ROOT / "docs/make_recipe.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path):
    for block in _blocks(page, "sh"):
        for name in re.findall(r"^\s*tunesmith (\w+)", block, re.MULTILINE):
            assert name in COMMANDS, f"{page.name} has `tunesmith {name}`"
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for name in re.findall(r"^\s*make (\w+)", block, re.MULTILINE):
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"{page.name} has `make {name}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_documents_are_valid(page: Path):
    for block in _blocks(page, "yaml"):
        values = yaml.safe_load(block)
        read_recipe({"model": "M", "data": "D.jsonl", **values})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_example_recipes_are_valid(path: Path):
    recipe = read_recipe(path)
    assert recipe.data.train
    assert recipe.data.eval
