"""bitsandbytes layers compute the same in training and evaluation, on every kind of CPU."""

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
from tunesmith.model.source import resolve_model

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


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_not_repacked_for_avx512(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU with AVX512-BF16, where bitsandbytes repacks in evaluation, for good."""

    def repacked(*_: object) -> None:
        raise AssertionError("the weight is repacked")

    modules = bnb.nn.modules
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repacked)
    source = resolve_model(str(tiny_folder(tmp_path / "m", hidden_size=96)))
    model = load_causal_lm(source, dtype="float32", quantization=Quantization(kind)).model
    layers = [m for m in model.modules() if isinstance(m, modules.Linear4bit)]
    assert layers
    model.eval()
    for layer in layers:
        given = torch.randn(3, layer.in_features)
        with torch.no_grad():
            ours = layer(given)
            theirs = modules.Linear4bit.forward(layer, given)
        assert torch.equal(ours, layer.train()(given).detach())
        assert torch.allclose(ours, theirs, atol=1e-5)
        layer.eval()


def test_as_the_library_makes_it_a_layer_is_packed(packed: list[torch.Size]) -> None:
    """So the test below can fail: a width of 96 can't be packed and ends in an error."""
    made = bnb.nn.Linear4bit(96, 64, bias=False, quant_type="nf4").to("cpu").eval()
    with pytest.raises(RuntimeError, match="is invalid for input of size 96"):
        made(torch.ones(1, 96))
    assert [tuple(shape) for shape in packed] == [(64, 96)]


def test_a_run_its_evaluation_its_answers_and_its_merge_do_not_pack(
    packed: list[torch.Size], tmp_path: Path
) -> None:
    rows = str(write_jsonl(tmp_path / "rows.jsonl", chat_rows()))
    recipe = {
        "model": {
            "name": str(tiny_folder(tmp_path / "m")),
            "dtype": "float32",
            "quantization": "nf4",
        },
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
