"""Low-rank additions in few passes, against peft's own forward and its gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tiny import tiny_model
from tunesmith.model.adapters import fused_lora as module
from tunesmith.model.adapters.fused_lora import fuse_low_rank
from tunesmith.model.ops.activation_checkpointing import set_checkpointing


class Two(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40, bias=bias), nn.Linear(40, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(*, bias: bool = True, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=["first", "second"], init_lora_weights=False, r=4, lora_alpha=6, **options
    )
    return get_peft_model(Two(bias), config).to(dtype)  # pyright: ignore[reportArgumentType]


def outcome(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(2, 7, 24).to(dtype).requires_grad_()
    output = model(x)
    output.backward(torch.randn(output.shape).to(dtype))
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"output": output.detach(), "input": x.grad, **found}  # pyright: ignore


def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each addition was written over the map's result."""
    seen: list[bool] = []
    apply = module._PlusLowRank.apply

    def counted(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return apply(*arguments)

    monkeypatch.setattr(module._PlusLowRank, "apply", counted)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.4}], ids=str)
def test_outputs_and_gradients_are_pefts(bias: bool, options: Any, monkeypatch: Any) -> None:
    model, seen = adapted(bias=bias, **options), used(monkeypatch)
    expected = outcome(copy.deepcopy(model))
    assert not seen
    assert fuse_low_rank(model) == 2
    torch.testing.assert_close(outcome(model), expected, rtol=1e-4, atol=1e-5)
    assert seen == [True, True]


def test_bfloat16_is_nearer_to_the_truth(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "needs_upcast", lambda _: False)
    model = adapted(dtype=torch.bfloat16)
    truth = outcome(copy.deepcopy(model).double(), torch.float64)
    plain = outcome(copy.deepcopy(model), torch.bfloat16)
    fuse_low_rank(model)
    found = outcome(model, torch.bfloat16)
    errors = [
        sum(float((side[n].double() - true).norm() / true.norm()) for n, true in truth.items())
        for side in (found, plain)
    ]
    assert errors[0] < errors[1] < 0.2


def merged(model: Any) -> None:
    model.merge_adapter()


def two_at_once(model: Any) -> None:
    model.add_adapter("more", LoraConfig(target_modules=["first"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "more"])


def hooked(model: Any) -> None:
    for name, part in model.named_modules():
        if name.endswith("lora_A.default"):
            part.register_forward_hook(lambda _, __, output: 2 * output)


@pytest.mark.parametrize("change", [merged, two_at_once, hooked])
def test_the_rest_is_left_to_peft(change: Any, monkeypatch: Any) -> None:
    model, seen = adapted(), used(monkeypatch)
    change(model)
    expected = outcome(copy.deepcopy(model))
    fuse_low_rank(model)
    torch.testing.assert_close(outcome(model), expected, rtol=1e-4, atol=1e-5)
    assert not any(seen) or change is two_at_once  # where one map has a single one


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_are_left_to_peft(options: Any, monkeypatch: Any) -> None:
    model, seen = adapted(**options), used(monkeypatch)
    expected = outcome(copy.deepcopy(model))
    fuse_low_rank(model)
    torch.testing.assert_close(outcome(model), expected, rtol=1e-4, atol=1e-5)
    assert not seen


def test_a_disabled_adapter_adds_nothing() -> None:
    model = adapted()
    fuse_low_rank(model)
    x = torch.randn(3, 24)
    with model.disable_adapter():
        found = model(x)
    bare = model.unload()
    torch.testing.assert_close(found, bare(x))


def decoder(mode: Any) -> Any:
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    )
    set_checkpointing(model.get_base_model(), mode)
    return model.train()


@pytest.mark.parametrize("mode", ["none", "layers", "selective"])
def test_models_under_recomputation(mode: Any, monkeypatch: Any) -> None:
    seen = used(monkeypatch)
    ids = torch.arange(3, 40)[None]
    gradients = []
    for fused in (False, True):
        model = decoder(mode)
        if fused:
            fuse_low_rank(model)
        model(input_ids=ids).logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert bool(seen) == fused
    assert set(seen) == {mode != "selective"}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-8)


def test_quantised_maps() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32))
    model[0].weight = bnb.nn.Params4bit(torch.randn(96, 64), requires_grad=False).to("cpu")
    lora = get_peft_model(
        model, LoraConfig(target_modules=["0"], r=4, init_lora_weights=False)  # pyright: ignore
    )  # fmt: skip
    x = torch.randn(5, 64, requires_grad=True)
    toward = torch.randn(5, 96)

    def run() -> list[Any]:
        lora.zero_grad()
        x.grad = None
        output = lora(x)
        output.backward(toward)
        grads = [p.grad for p in lora.parameters() if p.requires_grad]
        return [output.detach(), x.grad, *grads]

    expected = run()
    assert fuse_low_rank(lora) == 1
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)


class _OwnLinear(nn.Linear):
    """Of a kind whose result is not written over."""


class _AddsInPlace(Two):
    def __init__(self, bias: bool) -> None:
        super().__init__(bias)
        self.first = _OwnLinear(24, 40, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += x.mean(-1, keepdim=True)  # as falcon does with what its linear maps return
        return self.second(torch.tanh(hidden))


def test_what_a_map_returns_may_be_added_to_in_place() -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["first", "second"], init_lora_weights=False, r=4)
    plain = get_peft_model(_AddsInPlace(True), config)  # pyright: ignore[reportArgumentType]
    fused = copy.deepcopy(plain)
    assert fuse_low_rank(fused) == 2
    expected = outcome(plain)
    for name, tensor in outcome(fused).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
