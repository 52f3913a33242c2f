"""YAML whose aliases expand to billions of values is refused while it is small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tiny import chat_rows, write_jsonl
from tunesmith.bounded_yaml import MOST_VALUES, safe_load
from tunesmith.cli.app import run
from tunesmith.config.read import read_recipe
from tunesmith.data.sources.splits import card_of
from tunesmith.errors import RecipeError

LISTS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10)
)
ONE_LINE = "{" + ", ".join(line for line in LISTS.splitlines()) + "}"
BOMBS = {"lists": LISTS, "merges": MERGES}


@pytest.mark.parametrize("kind", ["lists", "merges"])
def test_alias_bomb_is_refused(kind: str, tmp_path: Path) -> None:
    """In a process with limits, which it would pass within a second if it were expanded."""
    recipe = tmp_path / "bomb.yaml"
    recipe.write_text(f"model: x\ndata: {{train: y}}\n{BOMBS[kind]}")
    assert recipe.stat().st_size < 1000
    limited = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "from tunesmith.cli.app import run\n"
        "sys.exit(run(['train', sys.argv[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, str(recipe)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "once its aliases are followed" in done.stderr
    assert str(recipe) in done.stderr


def test_override_is_bounded_too(tmp_path: Path, capfd) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(2))
    words = ["train", "--model", "m", "--data", str(data), f"data.template_kwargs={ONE_LINE}"]
    assert run(words) == 2
    assert "once its aliases are followed" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["lists", "merges"])
def test_card_of_a_data_set_is_bounded_too(kind: str) -> None:
    assert card_of(f"---\n{BOMBS[kind]}---\n# Data\n") == {}


def test_the_bound_is_exact_and_ordinary_aliases_work() -> None:
    fits = f"[{', '.join(['1'] * (MOST_VALUES - 1))}]"
    assert len(safe_load(fits)) == MOST_VALUES - 1
    with pytest.raises(yaml.YAMLError, match="once its aliases"):
        safe_load(fits.replace("]", ", 1]"))
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n"
    assert safe_load(text) == yaml.safe_load(text)
    for empty in ("", "# nothing", "null", "3"):
        assert safe_load(empty) == yaml.safe_load(empty)


def test_anchor_that_holds_itself_is_an_error() -> None:
    with pytest.raises(RecipeError):
        read_recipe(None, ["data.template_kwargs=&a {x: *a}"])
