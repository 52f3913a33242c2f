"""bitsandbytes layers compute the same in training and evaluation, on every kind of CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import tiny_folder
from tunesmith.model.load import load_causal_lm
from tunesmith.model.quantization.load import Quantization
from tunesmith.model.source import resolve_model

bnb = pytest.importorskip("bitsandbytes")


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
    model = load_causal_lm(source, dtype="float32", quantization=Quantization(kind))
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
