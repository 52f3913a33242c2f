"""The two lines of `verify` on the whole checkpoint hold on a multimodal base, and fail when a
tensor is dropped or changed, or a key of the adapter renamed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import chat_rows, write_jsonl
from tunesmith.build.build import build
from tunesmith.build.job import Job
from tunesmith.config.read import read_recipe
from tunesmith.types import Document
from tunesmith.verify import exported
from tunesmith.verify.outcome import Outcome
from tunesmith.verify.resumed import run_through
from tunesmith.verify.verify import verify
from tunesmith.verify.whole import checkpoint_lines
from tunesmith.verify.workload import Bounds, bounded, chosen_documents
from wrappers import UNREAD, wrapper_folder

BOUNDS = Bounds(documents=2, rows=6)
Written = tuple[Job, Path, list[Document]]
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("given")
    wrapper_folder(place / "model", "gemma3")
    write_jsonl(place / "rows.jsonl", chat_rows(8))
    return place


def recipe_of(folder: Path, kind: str):
    return read_recipe(
        {
            "model": {"name": str(folder / "model"), "dtype": "float32"},
            "data": {"train": [str(folder / "rows.jsonl")], "shuffle": False},
            "optim": {"lr": 1e-2},
            "adapter": {"kind": kind},
        }
    )


def test_every_line_holds_on_a_multimodal_base(folder: Path) -> None:
    found = verify(recipe_of(folder, "none"), bounds=BOUNDS)
    assert not [o for o in found.outcomes if o.verdict == "fails"], found.outcomes
    line = next(o for o in found.outcomes if o.name == "whole checkpoint")
    assert line.verdict == "holds"
    assert line.counts["tensors"] == len(load_file(folder / "model" / "model.safetensors"))
    assert 0 < line.counts["unchanged"] < line.counts["tensors"]


def written(folder: Path, kind: str, place: Path) -> Written:
    job = build(bounded(recipe_of(folder, kind), BOUNDS))
    run_through(job, place / "run")
    exported.write(job, place / "model")
    return job, place / "model", chosen_documents(job, BOUNDS)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(folder, "none", tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return written(folder, "lora", tmp_path_factory.mktemp("adapter"))


def line_of(given: Written, copy: Path) -> Outcome:
    job, _, documents = given
    (line,) = checkpoint_lines(exported.Exported(job, copy, "a copy"), documents)
    return line


def planted(given: Written, place: Path, file: str, change: Callable[[State], State]) -> Outcome:
    copy = place / "copy"
    shutil.copytree(given[1], copy)
    assert line_of(given, copy).verdict == "holds", line_of(given, copy)
    save_file(change(load_file(copy / file)), copy / file, metadata={"format": "pt"})
    return line_of(given, copy)


def without(part: str) -> Callable[[State], State]:
    return lambda state: {name: t for name, t in state.items() if part not in name}


def one_bit(part: str) -> Callable[[State], State]:
    def change(state: State) -> State:
        name = next(name for name in state if part in name)
        flat = state[name].view(-1).view(torch.uint8)
        flat[0] ^= 1
        return state

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without(UNREAD), f"{UNREAD} is missing"),
        (without("patch_embedding"), "is missing"),
        (one_bit(UNREAD), f"{UNREAD} was not trained and is changed"),
        (one_bit("vision_tower"), "was not trained and is changed"),
    ],
    ids=["dropped MTP", "dropped vision", "changed MTP", "changed vision"],
)
def test_a_tensor_that_is_lost_or_changed_fails(
    whole: Written, tmp_path: Path, change: Callable[[State], State], named: str
) -> None:
    line = planted(whole, tmp_path, "model.safetensors", change)
    assert line.failed
    assert named in line.note
    assert line.advice


def renamed(state: State) -> State:
    name = next(name for name in state if "q_proj.lora_B" in name)
    return {key.replace(name, name.replace("q_proj", "query")): t for key, t in state.items()}


@pytest.mark.parametrize(
    ("change", "named"),
    [(renamed, "q_proj.lora_B.weight is missing"), (without("lora_B"), "is missing")],
    ids=["renamed key", "A alone"],
)
def test_an_adapter_that_does_not_fit_its_class_fails(
    adapter: Written, tmp_path: Path, change: Callable[[State], State], named: str
) -> None:
    line = planted(adapter, tmp_path, "adapter_model.safetensors", change)
    assert line.failed
    assert named in line.note


def test_an_adapter_that_moves_the_logits_otherwise_fails(adapter: Written, tmp_path: Path) -> None:
    def stronger(state: State) -> State:
        return {name: t * 1.5 if "lora_B" in name else t for name, t in state.items()}

    line = planted(adapter, tmp_path, "adapter_model.safetensors", stronger)
    assert line.failed
    assert line.note == ""
