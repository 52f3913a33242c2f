"""Every optimizer and each of its options, from the recipe to the weights; stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.config.read import read_recipe
from tunesmith.errors import RecipeError
from tunesmith.run import train

pytestmark = pytest.mark.usefixtures("torch_settings")

NAMES = ["adamw", "adamw_8bit", "adafactor", "lion", "muon", "sgd"]
BASE = [
    "batch.documents=4", "train.steps=4", "checkpoint.every=2", "device.threads=1",
    "optim.lr=1e-2", "optim.warmup=0", "model.dtype=float32",
]  # fmt: skip

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights(eight_chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Weights]:
    made: dict[tuple[str, ...], Weights] = {}

    def run(*overrides: str) -> Weights:
        if overrides not in made:
            out = tmp_path_factory.mktemp("runs") / "run"
            train(
                model=str(eight_chats / "model"), data=str(eight_chats / "rows.jsonl"), out=out,
                overrides=[*BASE, *overrides], progress=False,
            )  # fmt: skip
            made[overrides] = load_file(out / "model" / "model.safetensors")
        return made[overrides]

    return run


def distance(one: Weights, two: Weights) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in two)


@pytest.mark.parametrize("name", NAMES[1:])
def test_each_rule_leads_elsewhere(weights, name: str) -> None:
    assert distance(weights(f"optim.name={name}"), weights()) > 1e-5


@pytest.mark.parametrize(
    ("base", "override"),
    [
        ("sgd", "optim.momentum=0.5"),
        ("muon", "optim.momentum=0.5"),
        ("lion", "optim.betas=[0.5, 0.9]"),
        ("adafactor", "optim.weight_decay=0.5"),
        ("adamw", "optim.min_lr=0.5"),
        ("adamw", "optim.schedule=wsd"),
        ("adamw", "optim.lr_factors={embeddings: 0.1}"),
        ("adamw", "optim.lr_factors={mlp: 0.1}"),
    ],
)
def test_each_option_changes_the_weights(weights, base: str, override: str) -> None:
    assert distance(weights(f"optim.name={base}", override), weights(f"optim.name={base}")) > 1e-5


def test_the_share_of_decay_changes_the_weights(weights) -> None:
    wsd = "optim.schedule=wsd"
    assert distance(weights(wsd, "optim.decay=0.9"), weights(wsd)) > 1e-5


@pytest.mark.parametrize(
    ("group", "part"), [("embeddings", "embed_tokens"), ("head", "lm_head"), ("mlp", ".mlp.")]
)
def test_a_factor_of_zero_leaves_its_group_where_it_was(
    weights, eight_chats: Path, group: str, part: str
) -> None:
    before = load_file(eight_chats / "model" / "model.safetensors")
    after = weights("optim.lr_factors={" + group + ": 0}")
    for name in before:
        assert torch.equal(before[name], after[name]) == (part in name), name


@pytest.mark.parametrize("options", [[], ["optim.name=adamw_8bit", "model.dtype=bfloat16"]])
def test_a_run_with_paged_state_learns_the_same_to_the_bit(weights, options: list[str]) -> None:
    paged, usual = weights(*options, "device.paged_optimizer=true"), weights(*options)
    assert all(torch.equal(paged[name], usual[name]) for name in usual)


@pytest.mark.parametrize("group", ["lora_b", "nothing_has_this_name", "'(('"])
def test_a_group_of_nothing_is_refused(weights, group: str) -> None:
    with pytest.raises(RecipeError, match="lr_factors"):
        weights("optim.lr_factors={" + group + ": 2}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_stopped_and_resumed_to_the_bit(
    eight_chats: Path, tmp_path: Path, monkeypatch, name: str, dtype: str
) -> None:
    options = [*BASE, f"optim.name={name}", f"model.dtype={dtype}"]

    def run(out: Path) -> Weights:
        train(
            model=str(eight_chats / "model"), data=str(eight_chats / "rows.jsonl"), out=out,
            overrides=options, progress=False, resume=True,
        )  # fmt: skip
        return load_file(out / "model" / "model.safetensors")

    whole = run(tmp_path / "whole")
    from tunesmith.optim import Optimizer

    step = Optimizer.step

    def stopping(self, *args, **kwargs):
        if self.steps == 3:
            raise KeyError("stopped here")
        step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", stopping)
        with pytest.raises(KeyError, match="stopped here"):
            run(tmp_path / "parts")
    resumed = run(tmp_path / "parts")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_names_of_paged_rules_say_what_there_is_instead(name: str) -> None:
    with pytest.raises(RecipeError, match=f"must be one of adamw, .*not '{name}'") as caught:
        read_recipe({"model": "m", "data": {"train": "d"}, "optim": {"name": name}})
    assert "device.paged_optimizer=true" in str(caught.value.hint)
    assert "optim.name=adamw_8bit" in str(caught.value.hint)
