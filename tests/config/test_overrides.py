"""`section.key=value`: what it reaches, and how it fails."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config.read import read_recipe
from tunesmith.config.schema import Recipe
from tunesmith.errors import RecipeError

BASE = {
    "model": "M",
    "data": {"train": ["a.jsonl", {"path": "b.jsonl", "limit": 9}], "columns": {"prompt": "q"}},
}


def plain(recipe: Recipe, key: str) -> Any:
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    return value


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("optim.lr=2e-5", "optim.lr", 2e-5),
        ("optim.lr=auto", "optim.lr", "auto"),
        ("optim.max_grad_norm=null", "optim.max_grad_norm", None),
        ("optim.betas=[0.8,0.9]", "optim.betas", [0.8, 0.9]),
        ("data.train.0.path=x.jsonl", "data.train.0.path", "x.jsonl"),
        ("data.train.1.limit=3", "data.train.1.limit", 3),
        ("data.train.1.limit=3", "data.train.1.path", "b.jsonl"),
        ("data.train.2=c.jsonl", "data.train.2.path", "c.jsonl"),
        ("data.train.2.path=c.jsonl", "data.train.2.path", "c.jsonl"),
        ("data.train=[x,y]", "data.train.1.path", "y"),
        ("data.train=x", "data.train.0.path", "x"),
        ("data=x", "data.train.0.path", "x"),
        ("data.eval=2%", "data.eval", "2%"),
        ("data.eval={dev: d.jsonl}", "data.eval.dev.0.path", "d.jsonl"),
        ("data.columns.completion=a", "data.columns", {"prompt": "q", "completion": "a"}),
        ("data.columns={prompt: x}", "data.columns", {"prompt": "x"}),
        (
            "data.columns=prompt: x, completion: y",
            "data.columns",
            {"prompt": "x", "completion": "y"},
        ),
        (
            "data.template_kwargs.enable_thinking=false",
            "data.template_kwargs.enable_thinking",
            False,
        ),
        ("log.to=[wandb]", "log.to", ["wandb"]),
        ("log=wandb", "log.to", ["wandb"]),
        ("log=[wandb]", "log.to", ["wandb"]),
        ("adapter=lora", "adapter.kind", "lora"),
        ("adapter={kind: lora, rank: 4}", "adapter.rank", 4),
        ("checkpoint.every=10 min", "checkpoint.every", "10 min"),
        ("model.name=a=b", "model.name", "a=b"),
    ],
)
def test_override_reaches(override: str, key: str, expected: Any) -> None:
    assert plain(read_recipe(BASE, [override]), key) == expected


def test_items_of_a_list_that_is_written_out_can_be_changed() -> None:
    recipe = read_recipe(BASE, ["optim.betas=[0.8,0.9]", "optim.betas.1=0.99"])
    assert recipe.optim.betas == (0.8, 0.99)


def test_section_scalar_keeps_the_other_keys() -> None:
    recipe = read_recipe({"model": "M", "adapter": {"kind": "lora", "rank": 4}}, ["adapter=lora"])
    assert recipe.adapter.rank == 4


def test_later_overrides_win() -> None:
    assert read_recipe(BASE, ["optim.lr=1", "optim.lr=2"]).optim.lr == 2


def test_one_of_an_exclusive_pair_replaces_the_other_of_the_file() -> None:
    recipe = read_recipe({**BASE, "train": {"epochs": 2}}, ["train.steps=7"])
    assert (recipe.train.epochs, recipe.train.steps) == (None, 7)
    with pytest.raises(RecipeError, match="exclude each other"):
        read_recipe(BASE, ["train.steps=7", "train.epochs=1"])


def test_the_given_mapping_is_not_changed() -> None:
    source = {"model": "M", "optim": {"lr": 1.0}}
    read_recipe(source, ["optim.lr=2"])
    assert source == {"model": "M", "optim": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("learning_rate=1e-4", "optim.lr"),
        ("lora_r=4", "adapter.rank"),
        ("optim.lr=abc", "must be auto or a number"),
        ("optim.lr.x=1", "must be auto or a number"),
        ("data.train.7=x", "has 2 items, counted from 0"),
        ("data.train.path=x", "data.train.0"),
        ("model.name.x=1", "model.name is 'M'"),
        ("optim.betas=[0.9", "not YAML"),
        ("optim.lr=2024-13-45", "not YAML"),
        ("data.columns=&a {x: *a}", "not YAML"),
        ("optim.lr", "section.key=value"),
        ("=3", "section.key=value"),
        ("optim..lr=3", "section.key=value"),
    ],
)
def test_wrong_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(BASE, [override])
    assert message in str(caught.value)
    assert f"override {override}" in str(caught.value)
