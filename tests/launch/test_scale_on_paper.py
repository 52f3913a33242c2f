"""The arithmetic of docs/scale.md, and that its tables are what the script gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scale_on_paper as paper

ROOT = Path(__file__).parents[2]
SMALL, MIDDLE, LARGE = paper.MODELS


def test_tables_are_what_the_script_gives() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert paper.tables() in text


@pytest.mark.parametrize(
    ("model", "published"), [(SMALL, 8.030e9), (MIDDLE, 70.554e9), (LARGE, 405.853e9)]
)
def test_parameters_are_those_of_the_models_with_these_shapes(model, published) -> None:
    assert model.parameters == pytest.approx(published, rel=1e-3)


def test_parameters_are_those_that_transformers_counts() -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=100, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = paper.Model("x", 3, 64, 96, 4, 2, 100, head_width=16)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_states_are_those_of_the_estimate() -> None:
    """16 bytes a parameter, as `plan` and `launch` count for bfloat16 and AdamW."""
    import torch

    from tunesmith.model.memory.estimate import ModelSize, estimate

    size = ModelSize(SMALL.parameters, 0)
    whole = estimate(size, dtype=torch.bfloat16, rank=None)
    alone = paper.memory(SMALL, parts=1)
    assert (alone.weights, alone.gradients) == (whole.weights, whole.gradients)
    assert alone.optimizer == whole.optimizer
    for parts in (8, 64):
        shared = paper.memory(SMALL, parts=parts)
        for name in ("weights", "gradients", "optimizer"):
            assert getattr(shared, name) == pytest.approx(getattr(alone, name) / parts)
        assert shared.total == pytest.approx(sum(vars(shared).values()))


def test_bytes_of_a_step_are_those_of_rings_played_through() -> None:
    """Each collective as a ring, part by part: what one device sends, summed."""
    model = paper.Model("x", 3, 64, 96, 4, 2, 100, head_width=16)

    def ring(size: float, devices: int) -> float:
        return sum(size / devices for _ in range(devices - 1))

    for devices in (8, 32):
        for batches in (1, 2):
            sent = ring(2 * model.outside, devices)
            for _ in range(batches):
                for _ in range(model.layers):
                    sent += 2 * ring(2 * model.layer, devices) + ring(4 * model.layer, devices)
                sent += ring(4 * model.outside, devices)
            found = paper.step(model, devices=devices, shard="full", batches=batches)
            assert found.inside == pytest.approx(sent)
            nodes = devices // 8
            assert found.between == pytest.approx(sent / 8 if nodes > 1 else 0)
            hybrid = paper.step(model, devices=devices, shard="hybrid", batches=batches)
            part = 4 * model.parameters / 8
            assert hybrid.between == pytest.approx(2 * ring(part, nodes) if nodes > 1 else 0)


def test_more_devices_never_need_more_memory_and_less_work_never_waits_less() -> None:
    for model in paper.MODELS:
        totals = [paper.memory(model, parts=n).total for n in paper.COUNTS]
        assert totals == sorted(totals, reverse=True)
        steps = [paper.step(model, devices=64, shard="full", micro=m) for m in (512, 4096, 8192)]
        shares = [one.efficiency for one in steps]
        assert shares == sorted(shares)
        assert all(0 < share <= 1 for share in shares)


def test_a_micro_batch_that_fits_is_the_longest_that_does() -> None:
    for model in paper.MODELS:
        for parts in paper.COUNTS:
            found = paper.longest(model, parts=parts)
            if found is not None:
                assert paper.memory(model, parts=parts, micro=found).fits
                assert not paper.memory(model, parts=parts, micro=2 * found).fits
