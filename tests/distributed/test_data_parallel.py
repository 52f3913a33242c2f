"""What several ranks do once: prepare the rows, and gather the embedding and head in a step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from gang import losses, run_groups, weights
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.config.read import read_recipe
from tunesmith.estimate import forecast

LAYERS, STEPS = 2, 3
OPTIONS = [
    f"train.steps={STEPS}",
    "model.dtype=float32",
    "optim.lr=0.003",
    "batch.documents=8",
    "device.micro_tokens=96",
    "checkpoint.every=null",
]
NOTED = """
import json
from pathlib import Path
from tunesmith.data.preprocess import prepare
from tunesmith.distributed.peer_check import CheckedCollective
from tunesmith.train.trainer import Trainer

fresh = getattr(prepare._fresh, "whole", prepare._fresh)
call = getattr(CheckedCollective.__call__, "whole", CheckedCollective.__call__)
learn = getattr(Trainer._learn, "whole", Trainer._learn)
step = [-1]

def note(*what):
    with open(Path({place!r}) / f"{name}-{{rank}}", "a") as file:
        file.write(json.dumps(what) + "\\n")

def freshly(*args, **options):
    found = fresh(*args, **options)
    note("prepared", len(found.documents))
    return found

def gathering(self, *tensors, **options):
    if step[0] >= 0 and "op" not in options:  # not what adds gradients up
        note("gathered", step[0], options["output_tensor"].numel())
    return call(self, *tensors, **options)

def learning(self, number, lr):
    step[0] = number
    try:
        return learn(self, number, lr)
    finally:
        step[0] = -1

freshly.whole, gathering.whole, learning.whole = fresh, call, learn
prepare._fresh, CheckedCollective.__call__, Trainer._learn = freshly, gathering, learning
"""

ALLOWED = """
from dataclasses import replace
from tunesmith.build import build

check = build.check_together
build.check_together = lambda recipe, facts: check(recipe, replace(facts, device="cuda"))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_folder(folder / "model", num_hidden_layers=LAYERS)
    write_jsonl(folder / "rows.jsonl", chat_rows(14))

    def job(name: str, *more: str, prelude: str = "") -> dict:
        return {
            "model": str(folder / "model"), "data": str(folder / "rows.jsonl"),
            "out": str(folder / f"run-{name}"),
            "overrides": [*OPTIONS, *more],
            "prelude": NOTED.format(place=str(folder), name=name) + prelude,
        }  # fmt: skip

    kept = f"device.cache={folder / 'cache'}"
    parts = ["device.shard=full", kept]
    codes, _ = run_groups(
        [
            (2, [
                job("kept", kept),
                job("unkept", "device.cache=false"),
                job("parts", *parts),
                job("offloaded", *parts, "device.shard_offload=true", prelude=ALLOWED),
            ])
        ]
    )  # fmt: skip
    assert codes == [[0, 0]]
    return folder


def noted(folder: Path, name: str, rank: int) -> list[list]:
    file = folder / f"{name}-{rank}"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize("name", ["kept", "unkept"])
def test_one_rank_prepares_and_the_others_map_it(runs: Path, name: str) -> None:
    prepared = [noted(runs, name, rank)[:1] for rank in (0, 1)]
    assert prepared == [[["prepared", 14]], []]


@pytest.mark.parametrize("rank", [0, 1])
def test_embedding_and_head_are_gathered_once_a_step(runs: Path, rank: int) -> None:
    """Layers are for the forward and the backward of each micro-batch."""
    gathered = [entry[1:] for entry in noted(runs, "parts", rank) if entry[0] == "gathered"]
    config = json.loads((runs / "model" / "config.json").read_text())
    both = 2 * config["vocab_size"] * config["hidden_size"]  # embedding and head, untied
    for number in range(STEPS):
        sizes = Counter(size for step, size in gathered if step == number)
        (root,) = [size for size in sizes if size > both]
        (layer,) = [size for size in sizes if size <= both]
        assert sizes[root] == 1
        assert sizes[layer] >= 2 * 2 * LAYERS  # of two micro-batches or more


def test_parts_that_rest_in_the_hosts_memory_learn_the_same(runs: Path) -> None:
    """On a CPU both are the same memory, so this is refused to users, and shows the way alone."""
    one, two = (runs / f"run-{name}" for name in ("parts", "offloaded"))
    assert losses(one) == losses(two)
    assert losses(one)[-1] < losses(one)[0]
    first, second = weights(one), weights(two)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_plan_says_which_batch_would_fill_the_ranks(llama_folder: Path, tmp_path: Path) -> None:
    """And that it changes what is learned; a batch that fills them is not remarked upon."""
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(64))
    given = {"model": str(llama_folder), "data": {"train": [str(data)]}}
    options = ["device.kind=cpu", "train.epochs=1", "device.ranks=2"]
    options.append("device.share_prefixes=false")
    (line,) = _of_ranks(given, [*options, "batch.documents=1"])
    assert "of the time of 2 ranks is idle, since a step is too small" in line
    assert line.endswith("fills it, and changes what is learned")
    wanted = line.split("batch.documents=")[1].split()[0]
    assert _of_ranks(given, [*options, f"batch.documents={wanted}"]) == []
    few = write_jsonl(tmp_path / "few.jsonl", chat_rows(1))
    given["data"] = {"train": [str(few)]}
    (line,) = _of_ranks(given, [*options, "batch.documents=1"])
    assert line.endswith("fewer ranks learn the same as fast: device.ranks=1")


def _of_ranks(given: dict, options: list[str]) -> list[str]:
    return [line for line in forecast(read_recipe(given, options)).warnings if "ranks:" in line]
