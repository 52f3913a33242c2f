"""Recipes written as YAML read back equal, and differences are told key by key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tunesmith.config.dump import changed_sections, differences, science_dict, to_yaml
from tunesmith.config.read import read_recipe
from tunesmith.config.schema import SCIENCE

RECIPES = [
    {"model": "M"},
    {"model": "M", "data": "a.jsonl", "train": {"steps": 10}, "batch": {"tokens": 999}},
    {"model": "M", "adapter": {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}},
    {"model": "M", "data": {"eval": "2.5%"}, "optim": {"lr": "1e-07", "eps": 1e-12}},
    {"model": "M", "data": {"eval": 200}, "checkpoint": {"every": "0.1 epoch"}},
    {"model": "M", "data": {"eval": {"a": ["x", {"path": "y", "limit": 2}]}}, "eval": None},
    {"model": "M", "checkpoint": {"every": None}, "eval": {"every": "2.5 min"}},
    {"model": "1e5", "data": {"train": ["no", "ünï.jsonl"], "train_on": ["assistant", "tool"]}},
]


@pytest.mark.parametrize("source", RECIPES)
def test_yaml_reads_back_equal(source: dict[str, object], tmp_path: Path) -> None:
    recipe = read_recipe(source)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    again = read_recipe(path)
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)
    assert not differences(recipe, again)


def test_yaml_writes_defaults_out_in_plain_values() -> None:
    values = yaml.safe_load(to_yaml(read_recipe({"model": "M"})))
    assert values["train"]["epochs"] == 3
    assert values["batch"]["documents"] == 32
    assert values["checkpoint"]["every"] == "1 epoch"
    assert list(values)[:2] == ["model", "data"]


def test_differences_name_keys_values_and_sections() -> None:
    old = read_recipe({"model": "M", "data": ["a", "b"]})
    new = read_recipe(old, ["optim.lr=1e-4", "data.train=[a]", "device.micro_tokens=64"])
    found = differences(old, new)
    assert ("optim.lr", "auto", 1e-4) in found
    assert ("data.train.1.path", "b", None) in found
    assert ("device.micro_tokens", "auto", 64) in found
    assert changed_sections(found) == ["data", "optim", "device"]


def test_emptied_lists_and_mappings_are_differences() -> None:
    old = read_recipe({"model": "M", "data": {"template_kwargs": {"x": 1}}, "log": ["wandb"]})
    new = read_recipe(old, ["log.to=[]", "data.template_kwargs={}"])
    assert changed_sections(differences(old, new)) == ["data", "log"]


def test_science_leaves_out_what_only_changes_speed() -> None:
    first = read_recipe({"model": "M"})
    second = read_recipe(first, ["device.micro_tokens=64", "checkpoint.keep=9", "eval.samples=3"])
    assert science_dict(first) == science_dict(second)
    assert tuple(science_dict(first)) == SCIENCE
    assert science_dict(first) != science_dict(read_recipe(first, ["train.seed=1"]))
