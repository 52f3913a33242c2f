"""Renamed recipe keys: a user's recipe is told the new name, a run's recipe is translated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.config.read import read_recipe
from tunesmith.config.renamed import translated
from tunesmith.errors import RecipeError

OLD = [
    ("context", 2, "context_parallel", 2),
    ("tensor", 2, "tensor_parallel", 2),
    ("prepare_processes", 3, "num_proc", 3),
    ("attention", "isolated", "attention", "unpacked"),
]


@pytest.mark.parametrize(("old", "value", "new", "now"), OLD)
@pytest.mark.parametrize("way", ["file", "mapping", "override"])
def test_an_old_name_is_an_error_that_names_the_new_one(
    tmp_path: Path, way: str, old: str, value: object, new: str, now: object
) -> None:
    base: dict[str, object] = {"model": "m", "data": "rows.jsonl"}
    file = tmp_path / "r.yaml"
    file.write_text(f"model: m\ndata: rows.jsonl\ndevice:\n  {old}: {value}\n")
    sources = {
        "file": (file, []),
        "mapping": ({**base, "device": {old: value}}, []),
        "override": (base, [f"device.{old}={value}"]),
    }
    with pytest.raises(RecipeError) as caught:
        read_recipe(*sources[way])
    assert caught.value.hint == f"write device.{new}={now}"
    assert f"device.{old}" in str(caught.value.where)
    if way == "file":
        assert "r.yaml:4" in str(caught.value.where)


def test_all_old_names_are_told_at_once() -> None:
    device = {old: value for old, value, _, _ in OLD}
    with pytest.raises(RecipeError) as caught:
        read_recipe({"model": "m", "data": "rows.jsonl", "device": device})
    assert all(f"device.{new}" in str(caught.value) for _, _, new, _ in OLD)


@pytest.mark.parametrize(("old", "value", "new", "now"), OLD)
def test_the_recipe_of_a_run_is_translated(
    tmp_path: Path, old: str, value: object, new: str, now: object
) -> None:
    text = f"model: m\ndata: rows.jsonl\ndevice:\n  {old}: {value}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "machine.json").write_text(json.dumps({}))
    for source in (tmp_path, tmp_path / "recipe.yaml"):
        assert getattr(read_recipe(source).device, new) == now
    asked = {"model": {"name": "m"}, "data": {"train": ["r"]}, "device": {old: value}}
    assert getattr(read_recipe(asked, of_run=True).device, new) == now
    assert asked["device"] == {old: value}


def test_what_is_not_renamed_stays() -> None:
    recipe = {"model": "m", "device": {"kind": "cpu"}, "data": ["a"]}
    assert translated(recipe) == recipe
