"""What `auto` chooses follows from the memory that is free, and from what a token takes here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from tiny import tiny_folder
from tunesmith.build import microbatch_size as memory
from tunesmith.build.microbatch_size import choose_micro_batch, measured_cost
from tunesmith.config.read import read_recipe
from tunesmith.model.load import load_causal_lm
from tunesmith.model.memory.activations import Cost
from tunesmith.model.source import resolve_model

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def model(tmp_path: Path):
    return load_causal_lm(resolve_model(str(tiny_folder(tmp_path / "m"))), dtype="float32").model


def recipe(*changes: str):
    return read_recipe({"model": "m", "data": {"train": ["x.jsonl"]}}, list(changes))


def fit(model, room: int, *changes: str, longest: int = 300):
    return choose_micro_batch(recipe(*changes), model, CPU, longest=longest, room=room, held=None)


def test_less_room_recomputes_and_takes_fewer_tokens(model) -> None:
    ample, some, little = (fit(model, room * MIB) for room in (4000, 14, 3))
    assert (ample.tokens, ample.checkpointing) == (1024, "none")
    assert (little.tokens, little.checkpointing) == (512, "layers")
    assert some.tokens <= ample.tokens
    assert some.checkpointing in ("none", "selective")
    assert "by formula" in ample.reason
    assert "by formula" not in little.reason  # measured, since it matters


def test_a_longer_document_turns_recomputing_on(model) -> None:
    room = 20 * MIB
    assert fit(model, room, longest=100).checkpointing == "none"
    assert fit(model, room, longest=3000).checkpointing == "layers"


def test_what_is_asked_for_is_kept(model) -> None:
    asked = fit(model, 3 * MIB, "device.gradient_checkpointing=none")
    assert asked.checkpointing == "none"
    assert fit(model, 4000 * MIB, "device.gradient_checkpointing=2").checkpointing == 2
    assert fit(model, 3 * MIB, "device.micro_tokens=777").tokens == 777
    large = fit(model, 30 * MIB, "device.micro_tokens=8192")
    assert (large.tokens, large.checkpointing) == (8192, "layers")


def test_a_probe_leaves_nothing_behind(model) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state, mode = torch.get_rng_state(), model.training
    cost = measured_cost(model, CPU, longest=200)
    assert cost("none").per_token > cost("layers").per_token > 0
    assert cost("none").measured
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is mode


def test_the_measured_cost_foretells_a_longer_document(model) -> None:
    cost = measured_cost(model, CPU, longest=2000)("none")
    memory._bytes_of(model, 64, CPU)
    real = memory._bytes_of(model, 2000, CPU)
    assert cost.fixed + cost.per_token * 2000 == pytest.approx(real, rel=0.1)


def test_scores_that_are_held_grow_with_the_square() -> None:
    bytes_of = [10 + 3 * n + 2 * n * n for n in (64, 256, 512)]
    found = memory._fitted((64, 256, 512), bytes_of, 4096)
    assert found.per_token == pytest.approx(3 + 2 * 4096)
    assert found.fixed == pytest.approx(10)


def test_a_mode_that_runs_out_of_memory_is_passed_over(model, monkeypatch) -> None:
    def fails(*_: object, **__: object) -> int:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(memory, "_bytes_of", fails)
    cost = measured_cost(model, CPU, longest=100)("none")
    assert cost.tokens(2**40) == 0
    monkeypatch.setattr(
        memory, "measured_cost", lambda *_, **__: lambda mode: cost if mode == "none" else Cost(1.0)
    )
    assert fit(model, 3 * MIB).checkpointing == "selective"


@pytest.mark.any_dtype
def test_free_memory_decides_in_a_run(tmp_path: Path, monkeypatch) -> None:
    from tiny import chat_rows, write_jsonl

    build = importlib.import_module("tunesmith.build.build")
    folder = tiny_folder(tmp_path / "m")
    rows = write_jsonl(tmp_path / "chats.jsonl", chat_rows())
    model = {"name": str(folder), "dtype": "float32"}
    asked = read_recipe({"model": model, "data": {"train": [str(rows)]}}, [])
    plenty = build.build(asked)
    monkeypatch.setattr(importlib.import_module("tunesmith.build.model"), "free_memory",
                        lambda _: 12 * MIB)  # fmt: skip
    scarce = build.build(asked)
    assert plenty.choices.resolved["gradient_checkpointing"] == "none"
    assert scarce.choices.resolved["gradient_checkpointing"] != "none"
    assert scarce.microbatching.micro_tokens < plenty.microbatching.micro_tokens
    (line,) = [note for note in scarce.choices.notes if note.startswith("device:")]
    assert f"gradient_checkpointing {scarce.choices.resolved['gradient_checkpointing']}" in line
