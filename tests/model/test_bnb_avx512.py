"""bitsandbytes' weight packing for CPUs with AVX512-BF16 is never entered by a 4-bit base of ours.

The library asks `has_avx512bf16` when a map is made. Here it is told that the CPU has it, so what
follows is the library's own code, and it packs in PyTorch as it would there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.model.load import load_causal_lm
from tunesmith.model.quantization.load import Quantization
from tunesmith.model.source import ModelSource

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the weights that bitsandbytes packed, on what it takes for such a CPU."""
    shapes: list[torch.Size] = []
    own = bnb.nn.modules._convert_weight_packed_for_cpu

    def pack(weight: Any, state: Any, **options: Any) -> Any:
        shapes.append(state.shape)
        return own(weight, state, **options)

    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", pack)
    return shapes


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "model", num_hidden_layers=2)


def four_bit_maps(base: Path, kind: str = "nf4") -> list[Any]:
    model = load_causal_lm(
        ModelSource("base", base), dtype="float32", quantization=Quantization(kind)
    )
    return [m for m in model.base.modules() if isinstance(m, bnb.nn.Linear4bit)]


def test_as_the_library_makes_it_a_map_is_packed(packed: list[torch.Size]) -> None:
    """So the tests below would see it: a width of 96 can't be packed and ends in an error."""
    made = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4").to("cpu").eval()
    with pytest.raises(RuntimeError, match="is invalid for input of size 96"):
        made(torch.ones(1, 96))
    assert [tuple(shape) for shape in packed] == [(64, 96)]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_neither_forward_pass_packs(packed: list[torch.Size], base: Path, kind: str) -> None:
    """Nor does the inherited one, which a caller may ask for by its class."""
    maps = four_bit_maps(base, kind)
    assert {module.in_features for module in maps} == {64, 96}
    for module in maps:
        x = torch.randn(3, module.in_features)
        with torch.no_grad():
            ours = module.eval()(x)
            theirs = bnb.nn.Linear4bit.forward(module, x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert packed == []


def test_a_run_its_evaluation_its_answers_and_its_merge_do_not_pack(
    packed: list[torch.Size], base: Path, tmp_path: Path
) -> None:
    rows = str(write_jsonl(tmp_path / "rows.jsonl", chat_rows()))
    recipe = {
        "model": {"name": str(base), "dtype": "float32", "quantization": "nf4"},
        "data": {"train": rows, "eval": rows},
        "adapter": "lora",
        "batch": 4,
        "train": {"steps": 2},
        "eval": {"every": 1},
    }
    run = tunesmith.train(recipe, out=tmp_path / "run", progress=False)
    assert command(["eval", str(run.folder), "--data", rows, "--max-new-tokens", "3"]) == 0
    assert command(["merge", str(run.folder), "--out", str(tmp_path / "merged")]) == 0
    assert packed == []
