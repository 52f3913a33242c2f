"""bfloat16 through float32 units: the same products, rounded once, and exact weight gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tiny import tiny_folder, tiny_model
from tunesmith.model.load import load_causal_lm, settings_kept, wrap_causal_lm
from tunesmith.model.ops import bf16_upcast
from tunesmith.model.source import resolve_model


@pytest.fixture
def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_upcast, "cpu_bfloat16", lambda: None)


def linear(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 32, bias=bias).to(torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_exact_sums_rounded_once(no_units, bias: bool) -> None:
    module = linear(bias)
    holder = nn.Sequential(module)
    module.weight.grad_dtype = torch.float32
    assert bf16_upcast.upcast_linear_layers(holder) == 1
    x = torch.randn(2, 5, 48, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    out = holder(x)
    out.backward(grad)

    exact = x.detach().double() @ module.weight.detach().double().T
    if bias:
        exact += module.bias.detach().double()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-6)
    back = grad.double() @ module.weight.detach().double()
    torch.testing.assert_close(x.grad.double(), back, rtol=2**-8, atol=1e-6)
    rows, columns = grad.double().reshape(-1, 32), x.detach().double().reshape(-1, 48)
    assert module.weight.grad.dtype == torch.float32
    torch.testing.assert_close(module.weight.grad.double(), rows.T @ columns, rtol=1e-5, atol=1e-6)
    if bias:
        torch.testing.assert_close(module.bias.grad.double(), rows.sum(0), rtol=2**-8, atol=1e-6)


def test_other_precisions_and_kinds_are_left_alone(no_units) -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4).to(torch.bfloat16))
    assert bf16_upcast.upcast_linear_layers(model) == 0
    module = linear(False)
    holder = nn.Sequential(module)
    bf16_upcast.upcast_linear_layers(holder)
    x = torch.randn(3, 48)
    assert torch.equal(module.float()(x), nn.functional.linear(x, module.weight))


def test_hardware_with_units_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_upcast, "cpu_bfloat16", lambda: "AMX")
    assert bf16_upcast.upcast_linear_layers(nn.Sequential(linear(False))) == 0
    assert not bf16_upcast.needs_upcast(torch.zeros(1, dtype=torch.bfloat16))


def test_a_loaded_model_is_wide_and_says_so(no_units, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    loaded = load_causal_lm(resolve_model(str(folder)), dtype="bfloat16")
    assert any("multiplied in float32" in note for note in loaded.notes)
    assert any(type(module) is bf16_upcast.UpcastLinear for module in loaded.model.modules())
    plain = load_causal_lm(resolve_model(str(folder)), dtype="float32")
    assert not any("multiplied in float32" in note for note in plain.notes)


def test_a_model_of_the_caller_comes_back_as_it_was(no_units) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    before = [type(module) for module in model.modules()]
    with settings_kept(model):
        wrap_causal_lm(model)
        assert [type(module) for module in model.modules()] != before
    assert [type(module) for module in model.modules()] == before
