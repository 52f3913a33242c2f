"""What ranks can't do together is refused before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tunesmith
from tunesmith.config.compatibility import Facts, check_together
from tunesmith.config.read import read_recipe
from tunesmith.distributed import spawn
from tunesmith.distributed.env import is_main_process, launched_world_size
from tunesmith.distributed.world import World
from tunesmith.errors import RecipeError

TWO = World(0, 2, 0, 2)


def check(ranks: World, *overrides: str) -> None:
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, list(overrides))
    check_together(recipe, Facts(ranks.size, ranks.local_size, "cpu"))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["device.shard=full", "optim=muon"], "optim.name"),
        (["device.shard=full", "optim=adamw_8bit"], "optim.name"),
        (["device.shard=full", "adapter=dora"], "adapter.kind"),
        *(
            (
                ["device.shard=full", f"model.quantization={kept}", "adapter=lora"],
                "model.quantization",
            )
            for kept in ("int8", "torchao_int8", "torchao_fp8", "torchao_int4")
        ),
        (["device.shard=full", "eval.samples=2", "data.eval=2%"], "eval.samples"),
        (["device.shard=hybrid"], "device.shard"),
        (["device.shard_offload=true"], "device.shard_offload"),
        (["device.shard=full", "device.shard_offload=true"], "device.shard_offload"),
    ],
)
def test_what_needs_whole_weights_names_its_key(overrides: list[str], key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(TWO, *overrides)
    assert caught.value.where == key
    assert caught.value.hint


def test_one_process_has_nothing_to_share() -> None:
    check(World())
    with pytest.raises(RecipeError, match="nobody to share"):
        check(World(), "device.shard=full")


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_elementwise_optimizers_and_lora_may_be_spread(name: str) -> None:
    check(TWO, "device.shard=full", f"optim={name}", "adapter=lora")
    check(World(0, 8, 0, 4), "device.shard=hybrid", f"optim={name}")


def test_ranks_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(spawn, "_gpus", lambda: 4)
    assert spawn.ranks_to_start("auto", "auto") == 4
    assert spawn.ranks_to_start("cuda", 3) == 3
    assert spawn.ranks_to_start("cpu", "auto") == 1
    assert spawn.ranks_to_start("cpu", 8) == 8
    with pytest.raises(RecipeError, match="there are 4"):
        spawn.ranks_to_start("auto", 5)
    with pytest.raises(RecipeError, match="one process"):
        spawn.ranks_to_start("mps", 2)
    monkeypatch.setattr(spawn, "_gpus", lambda: 0)
    assert spawn.ranks_to_start("auto", "auto") == 1
    assert spawn.ranks_to_start("auto", 2) == 2
    started = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    assert spawn.ranks_to_start("auto", 2) == 1
    assert launched_world_size() == 2
    assert not is_main_process()


def test_a_call_from_python_is_one_rank(llama_folder, chats) -> None:
    with pytest.raises(RecipeError, match=r"runs in one process, and device[.]ranks is 2"):
        tunesmith.train(model=llama_folder, data=chats, overrides=["device.ranks=2"])


@pytest.mark.parametrize("key", ["sequence_parallel", "pipeline_parallel"])
def test_other_ways_to_share_have_no_key(key: str) -> None:
    with pytest.raises(RecipeError):
        read_recipe({"model": "M", "data": "D.jsonl"}, [f"device.{key}=2"])


def test_torch_distributed_is_known_in_one_place() -> None:
    package = Path(tunesmith.__file__).parent
    allowed = {package / "checkpoint" / "sharded.py"}
    for file in package.rglob("*.py"):
        if "distributed" in file.relative_to(package).parts or file in allowed:
            continue
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"(import|from) torch\.distributed", text), file
