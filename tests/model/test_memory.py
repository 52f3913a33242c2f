"""Sizes computed from the config are those of the real model; what can't fit is refused with what
would.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import tiny_config, tiny_folder
from tunesmith.errors import ModelError
from tunesmith.model.adapters import AdapterSpec, add_adapter
from tunesmith.model.load import load_causal_lm
from tunesmith.model.memory import estimate as memory
from tunesmith.model.memory.activations import Cost, choose_micro_tokens, computed_cost
from tunesmith.model.memory.estimate import (
    ModelSize,
    check_fits,
    estimate,
    free_memory,
    measure,
)
from tunesmith.model.source import resolve_model
from tunesmith.optim.adamw import AdamW

BIG = ModelSize(parameters=10**9, per_rank=10**6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
def test_counts_are_those_of_the_real_model(family: str, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path / "m", family)))
    size = measure(source)
    causal_lm = load_causal_lm(source, dtype="float32").model
    assert size.parameters == sum(p.numel() for p in causal_lm.parameters())
    report = add_adapter(causal_lm, AdapterSpec(rank=5)).report
    needed = estimate(size, dtype=torch.float32, rank=5)
    assert (needed.trained, needed.parameters) == (report.trained, report.total)


@pytest.mark.parametrize(
    ("kind", "slack"),
    [("rslora", 0), ("dora", 0), ("pissa", 0), ("vera", 0), ("oft", 0), ("hra", 0), ("miss", 0),
     ("loha", 0), ("boft", 0), ("ia3", 0.2), ("lokr", 0.95)],
)  # fmt: skip
def test_counts_of_the_kinds(kind: str, slack: float, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path / "m")))
    size = measure(source)
    report = add_adapter(
        load_causal_lm(source, dtype="float32").model,
        AdapterSpec(kind=kind, rank=4, rotation_size=4),
    ).report
    needed = estimate(size, dtype=torch.float32, rank=4, kind=kind, rotation_size=4)
    assert abs(needed.trained - report.trained) <= slack * needed.trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_bytes_are_the_optimizers(dtype: torch.dtype, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path / "m")))
    causal_lm = load_causal_lm(source, dtype=dtype).model
    optimizer = AdamW(causal_lm.named_parameters())
    needed = estimate(measure(source), dtype=dtype, rank=None)
    assert optimizer.held_bytes == needed.optimizer
    assert needed.weights == sum(p.numel() * p.element_size() for p in causal_lm.parameters())


def test_what_fits_passes() -> None:
    needed = estimate(BIG, dtype=torch.bfloat16, rank=None)
    assert needed.total == (2 + 4 + 8 + 2) * 10**9
    assert check_fits(BIG, dtype=torch.bfloat16, rank=None, free=needed.total, name="m") == needed


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ModelError) as caught:
        check_fits(BIG, dtype=torch.float32, rank=None, free=5 * 10**9, name="m")
    message, hint = str(caught.value), caught.value.hint or ""
    assert "1,000M parameters" in message
    assert "4.7 GiB" in message  # free
    assert "14.9 GiB" in message  # needed
    assert "adapter=lora" in hint
    assert "model.dtype=bfloat16 needs" in hint
    assert not hint.startswith("model.dtype"), "full training in bfloat16 doesn't fit either"


def test_paging_is_named_where_it_is_enough() -> None:
    with pytest.raises(ModelError) as caught:
        check_fits(BIG, dtype=torch.bfloat16, rank=None, free=9 * 10**9, name="m")
    assert "device.paged_optimizer=true needs 7.5 GiB" in (caught.value.hint or "")
    paged = check_fits(BIG, dtype=torch.bfloat16, rank=None, free=9 * 10**9, name="m", paged=True)
    assert paged.total == 8 * 10**9


def test_hint_is_honest_where_nothing_fits() -> None:
    with pytest.raises(ModelError) as caught:
        check_fits(BIG, dtype=torch.bfloat16, rank=8, free=10**9, name="m")
    assert "nothing fits" in (caught.value.hint or "")


def test_free_memory_respects_control_groups(tmp_path: Path, monkeypatch) -> None:
    assert 0 < free_memory("cpu") <= memory._available() * 2
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 50000\n")
    assert memory._group_limit(tmp_path) == 350000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_limit(tmp_path) is None
    assert memory._group_limit(tmp_path / "nowhere") is None
    monkeypatch.setattr(memory, "_group_limit", lambda _: 1234)
    assert free_memory("cpu") == 1234


def test_micro_tokens_grow_with_room_and_recompute_only_where_they_must() -> None:
    config = tiny_config("llama", hidden_size=1024, intermediate_size=4096)
    cost = computed_cost(config, dtype=torch.float32)

    def choose(room: int, longest: int = 1000, device: str = "cpu"):
        return choose_micro_tokens(cost, device=device, room=room, longest=longest)

    large, small = choose(2**36), choose(2**29)
    assert large.tokens == 1024
    assert large.checkpointing == "none"
    assert small.checkpointing == "layers"
    assert small.tokens >= 512
    assert choose(2**36, device="meta").tokens == 32768
    assert choose(2**29, longest=100).tokens < 1024


def test_a_measured_cost_is_trusted_further_than_a_formula() -> None:
    assert Cost(100.0).tokens(10**6) == 5000
    assert Cost(100.0, measured=True).tokens(10**6) == 8000
    assert Cost(100.0, fixed=3e5, measured=True).tokens(10**6) == 5000
    assert Cost(100.0, fixed=9e5, measured=True).tokens(10**6) == 0


def test_a_frozen_copy_is_counted_and_can_be_given_up() -> None:
    full = estimate(BIG, dtype=torch.bfloat16, rank=None, frozen_copy=True)
    assert full.base == full.weights == 2 * 10**9
    assert full.total == (2 + 4 + 8 + 2 + 2) * 10**9
    assert estimate(BIG, dtype=torch.bfloat16, rank=8, frozen_copy=True).base == 0
    free = full.total - 1
    with pytest.raises(ModelError) as caught:
        check_fits(BIG, dtype=torch.bfloat16, rank=None, free=free, name="m", frozen_copy=True)
    assert "frozen copy 1.9 GiB" in str(caught.value)
    assert "objective.kl=0 needs" in (caught.value.hint or "")


def test_the_estimate_knows_what_each_rule_keeps() -> None:
    from tunesmith.model.memory.estimate import ModelSize, estimate

    size = ModelSize(1_000_000, 100)

    def state(name: str) -> int:
        return estimate(size, dtype=torch.float32, rank=None, optimizer=name).optimizer

    kept = {name: state(name) for name in ("adamw", "lion", "sgd", "adamw_8bit", "adafactor")}
    assert kept == {
        "adamw": 8_000_000, "lion": 4_000_000, "sgd": 4_000_000, "adamw_8bit": 2_031_250,
        "adafactor": 0,
    }  # fmt: skip
    paged = estimate(size, dtype=torch.bfloat16, rank=None, paged=True)
    assert paged.optimizer == 2_000_000  # what completes the masters stays
    lora = estimate(size, dtype=torch.bfloat16, rank=8, optimizer="muon")
    assert lora.optimizer == (4 + 2) * 800
