"""The table of what does not go together: every row fires, and all misfits are told at once."""

from __future__ import annotations

import pytest

from tunesmith.config.compatibility import TABLE, Facts, check_together
from tunesmith.config.read import read_recipe
from tunesmith.errors import RecipeError

FOUR = Facts(world_size=4, local_size=4, device="cuda")
CONTEXT, TENSOR = "device.context_parallel=2", "device.tensor_parallel=2"
SHARD, COMPILE, FLOAT8 = "device.shard=full", "device.compile=layers", "model.float8=rowwise"
NF4 = ["model.quantization=nf4", "adapter=lora"]

# One recipe for each row, in the table's order: its options, and facts where they are not FOUR.
ROWS: list[tuple[list[str], Facts]] = [
    ([CONTEXT, "device.attention=unpacked"], FOUR),
    ([CONTEXT, "objective.router_aux=0.1"], FOUR),
    ([CONTEXT, "objective.scheduled_sampling=0.1"], FOUR),
    ([TENSOR, CONTEXT], FOUR),
    ([TENSOR, SHARD], FOUR),
    ([TENSOR, "adapter=dora"], FOUR),
    ([TENSOR, *NF4], FOUR),
    ([TENSOR, "optim=muon"], FOUR),
    ([TENSOR, "device.attention=unpacked"], FOUR),
    ([TENSOR, "objective.scheduled_sampling=0.1"], FOUR),
    ([TENSOR, "eval.samples=2", "data.eval=2%"], FOUR),
    (["device.shard_offload=true"], FOUR),
    ([SHARD], Facts()),
    (["device.shard=hybrid"], FOUR),
    ([SHARD, "optim=muon"], FOUR),
    ([SHARD, "adapter=dora"], FOUR),
    ([SHARD, "model.quantization=int8", "adapter=lora"], FOUR),
    ([SHARD, "device.shard_offload=true"], Facts(4, 4, "cpu")),
    ([SHARD, "eval.samples=2", "data.eval=2%"], FOUR),
    (["model.quantization=nf4"], Facts(with_adapter=False)),
    (NF4, Facts(in_memory=True)),
    ([COMPILE, "device.kernels=liger"], FOUR),
    ([COMPILE, "device.gradient_checkpointing=selective"], FOUR),
    ([COMPILE, SHARD], FOUR),
    ([COMPILE, TENSOR], FOUR),
    ([COMPILE, "device.activation_offload=true"], FOUR),
    ([COMPILE, FLOAT8], FOUR),
    ([COMPILE, *NF4], FOUR),
    ([FLOAT8, *NF4], FOUR),
    ([FLOAT8, "adapter=dora"], FOUR),
    ([FLOAT8], Facts(4, 4, "cuda", with_adapter=True)),
    ([FLOAT8, "objective=psft"], FOUR),
    ([FLOAT8, "objective.kl=0.1"], FOUR),
    ([FLOAT8, SHARD], FOUR),
    ([FLOAT8, TENSOR], FOUR),
    ([FLOAT8, CONTEXT], FOUR),
]


def refused(options: list[str], facts: Facts) -> RecipeError:
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, options)
    with pytest.raises(RecipeError) as caught:
        check_together(recipe, facts)
    return caught.value


def test_every_row_has_its_recipe() -> None:
    assert len(ROWS) == len(TABLE)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_each_row_fires_alone(number: int) -> None:
    options, facts = ROWS[number]
    error = refused(options, facts)
    assert error.where == TABLE[number].key
    assert error.hint


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_without_its_cause_nothing_is_wrong(number: int) -> None:
    options, facts = ROWS[number]
    harmless = [one for one in options if one not in (CONTEXT, TENSOR, SHARD, COMPILE, FLOAT8)]
    harmless = [one for one in harmless if "shard" not in one]
    if facts in (Facts(with_adapter=False), Facts(in_memory=True)):  # the model is the cause
        harmless = [one for one in harmless if "quantization" not in one]
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, harmless)
    check_together(recipe, facts)


def test_an_adapter_that_is_not_looked_up_yet_is_not_missed() -> None:
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, ["model.quantization=nf4"])
    check_together(recipe, Facts())
    check_together(recipe, Facts(with_adapter=True))
    error = refused(["model.quantization=nf4", "adapter.top_layers=2"], Facts())
    assert error.where == "model.quantization"


def test_one_process_is_told_of_what_more_ranks_would_not_do_either() -> None:
    error = refused([SHARD, "optim=muon", "adapter=dora"], Facts())
    assert "3 errors in the recipe" in str(error)


def test_all_misfits_are_told_at_once() -> None:
    error = refused([SHARD, "optim=muon", "adapter=dora", "eval.samples=2", "data.eval=2%"], FOUR)
    assert "3 errors in the recipe" in str(error)
    for key in ("optim.name", "adapter.kind", "eval.samples"):
        assert key in str(error)
    assert "eval.samples=0" in str(error)


def test_groups_must_divide_the_world() -> None:
    error = refused(["device.context_parallel=3"], FOUR)
    assert error.where == "device.context_parallel"
    assert "groups of 3" in str(error)
    alone = refused([TENSOR], Facts())
    assert "nobody to divide the layers with" in str(alone)


def test_a_plain_recipe_fits() -> None:
    check_together(read_recipe({"model": "M", "data": "D.jsonl"}), Facts())
    check_together(read_recipe({"model": "M", "data": "D.jsonl"}, [SHARD, "adapter=lora"]), FOUR)
