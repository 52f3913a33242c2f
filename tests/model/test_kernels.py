"""Fused kernels in place of a model's own norms and gated units, by stand-ins for Liger's written
in plain torch: the choice of a variant, wrong ones, frozen weights, recomputing, whole runs.
"""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tunesmith
from gang import losses, weights
from tiny import chat_inputs, four_steps, tiny_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.errors import RecipeError
from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.kernels import Provider, restore_modules, use_kernels
from tunesmith.model.kernels import provider as provider_module
from tunesmith.model.kernels.trial import gate_variants, nearest, norm_variants
from tunesmith.model.lm_head import read_logit_transform
from tunesmith.model.ops.activation_checkpointing import set_checkpointing
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

attention.register()
CPU = torch.device("cpu")
HEAD = functools.partial(head_loss, objective=nll)
calls: list[str] = []


def norm(input: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    """By the formula, with what Liger casts when."""
    calls.append("norm")
    hidden = input if casting == "none" else input.float()
    scaled = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    if casting == "gemma":
        return (scaled * (offset + weight.float())).to(input.dtype)
    return scaled.to(input.dtype) * (offset + weight)


def silu(gate: Tensor, up: Tensor) -> Tensor:
    calls.append("silu")
    return gate * torch.sigmoid(gate) * up


def gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    calls.append("gelu_tanh")
    return nn.functional.gelu(gate, approximate="tanh") * up


RIGHT = Provider("Plain 1", norm, {"silu": silu, "gelu_tanh": gelu_tanh})


def wrapped(family: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = tiny_model(family, attention="tunesmith", num_hidden_layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
    return CausalLM(model.to(dtype), logits=read_logit_transform(model.config)).train()


def install(model: CausalLM, kernels: Provider = RIGHT, *, insist: bool = False) -> Any:
    dtype = model.head.weight.dtype
    return use_kernels(model.decoder, kernels, dtype=dtype, device=CPU, insist=insist)


def learned(model: CausalLM) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients over one document."""
    ids = np.random.default_rng(0).integers(5, 60, 50).astype(np.int32)
    index = np.arange(1, 50, dtype=np.int32)
    segment = Segment(ids, -1, 0, index, np.ones(49, np.float32), np.zeros(49, np.int32))
    (plan,) = plan_step([Document((segment,), Origin("x", 0))], micro_tokens=100)
    model.zero_grad()
    loss = model(collate(plan, CPU), HEAD).loss_sum
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def assert_same(model: CausalLM, expected: tuple[float, dict[str, Tensor]], bound: float) -> None:
    loss, gradients = learned(model)
    assert loss == pytest.approx(expected[0], rel=bound)
    assert gradients.keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        gap = (gradients[name].float() - wanted.float()).norm() / wanted.float().norm()
        assert gap < 3 * bound, name


@pytest.mark.parametrize(("family", "norms", "gate"), [
    ("llama", 5, "silu"), ("qwen3", 9, "silu"), ("gemma2", 9, "gelu_tanh"), ("gpt_oss", 5, None),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_replaced_and_that_it_is_the_same(
    family: str, norms: int, gate: str | None, dtype: torch.dtype
) -> None:
    model = wrapped(family, dtype)
    expected = learned(model)
    found = install(model)
    units = 0 if gate is None else 2
    assert (found.norms, found.norms_seen) == (norms, norms)
    assert (found.units, found.units_seen) == (units, units)
    assert found.text == f"Plain 1 for {norms} of {norms} norms and {units} of {units} gated units"
    calls.clear()
    assert_same(model, expected, 2e-6 if dtype == torch.float32 else 2e-2)
    assert calls.count("norm") == norms
    assert calls.count(str(gate)) == units
    assert len(calls) == norms + units


@pytest.mark.parametrize(("family", "expected"), [
    ("llama", "0 llama"), ("gemma2", "1 gemma"), ("gpt_oss", "0 gemma")
])  # fmt: skip
def test_the_variant_is_the_modules_own(family: str, expected: str) -> None:
    module = wrapped(family, torch.bfloat16).decoder.norm
    eps = "eps" if family == "gemma2" else "variance_epsilon"
    variants = norm_variants(RIGHT, eps)
    assert nearest(module, variants, torch.bfloat16, CPU)[1] == expected


def test_activations_that_are_nearly_the_same_are_told_apart() -> None:
    unit = wrapped("llama", torch.bfloat16).decoder.layers[0].mlp
    variants = gate_variants(RIGHT)
    assert nearest(unit, variants, torch.bfloat16, CPU)[1] == "silu"
    for activation, name in ((nn.GELU("tanh"), "gelu_tanh"), (nn.GELU(), None), (nn.Tanh(), None)):
        unit.act_fn = activation
        compute, found = nearest(unit, variants, torch.bfloat16, CPU)
        assert (found if compute else None) == name


def off_by_a_little(*given: Any) -> Tensor:
    return norm(*given) * 1.001


def forgets_epsilon(input: Tensor, weight: Tensor, eps: float, *given: Any) -> Tensor:
    return norm(input, weight, 0.5 * eps, *given)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.001


def wrong_gradient(*given: Any) -> Tensor:
    return WrongBackward.apply(norm(*given))  # pyright: ignore


def fails(*_: Any) -> Tensor:
    raise RuntimeError("no driver\nmore")


@pytest.mark.parametrize(("kernel", "why"), [
    (off_by_a_little, "times what rounding explains"), (forgets_epsilon, "rounding explains"),
    (wrong_gradient, "rounding explains"), (fails, "no driver$"),
])  # fmt: skip
def test_a_kernel_that_is_wrong_is_left_out(kernel: Any, why: str) -> None:
    model = wrapped("llama")
    expected = learned(model)
    with pytest.warns(UserWarning, match=f"Plain 1 is not used for LlamaRMSNorm: .*{why}"):
        found = install(model, replace(RIGHT, norm=kernel))
    assert (found.norms, found.norms_seen, found.units) == (0, 5, 2)
    assert "forward" not in vars(model.decoder.norm)
    assert_same(model, expected, 2e-6)
    gates = {"silu": fails}
    with pytest.raises(RecipeError, match="computes nothing of this model") as refused:
        install(wrapped("llama"), Provider("Wrong", kernel, gates), insist=True)
    assert refused.value.where == "device.kernels"


def test_one_kind_may_be_left_out_and_another_not() -> None:
    def small_only(input: Tensor, *given: Any) -> Tensor:
        return norm(input, *given) if input.shape[-1] < 64 else fails()

    model = wrapped("qwen3")
    with pytest.warns(UserWarning, match="Qwen3RMSNorm: no driver"):
        found = install(model, replace(RIGHT, norm=small_only))
    assert (found.norms, found.norms_seen) == (4, 9)


def test_modules_that_compute_something_else_are_left_alone() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), 1e-6

        def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
            return hidden * self.weight

    class Centred(Gated):
        def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
            return nn.functional.layer_norm(hidden, (16,), self.weight, eps=self.eps)

    model = nn.ModuleList([Gated(), nn.LayerNorm(16), nn.Linear(16, 16)])
    assert use_kernels(model, RIGHT, dtype=torch.float32, device=CPU).norms_seen == 0
    with pytest.warns(UserWarning, match="Centred"):
        found = use_kernels(Centred(), RIGHT, dtype=torch.float32, device=CPU)
    assert (found.norms, found.norms_seen) == (0, 1)


def test_a_frozen_weight_gets_no_gradient() -> None:
    model = wrapped("qwen3")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
    expected = learned(model)
    assert install(model).norms == 9
    assert_same(model, expected, 2e-6)
    assert model.decoder.norm.weight.grad is None


@pytest.mark.parametrize("mode", ["layers", "selective"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_recomputing_gives_the_same_bits(family: str, mode: str) -> None:
    model = wrapped(family)
    install(model)
    expected = learned(model)
    set_checkpointing(model.base, mode)
    calls.clear()
    assert_same(model, expected, 1e-12)
    assert len(calls) > (5 if family == "llama" else 9) + 2  # some were computed again


def test_names_classes_and_copies_stay() -> None:
    model = wrapped("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    install(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.decoder.norm.weight.mul_(2.0)
    hidden = torch.randn(1, 3, 64)
    calls.clear()
    assert torch.equal(twin.decoder.norm(hidden), 2 * model.decoder.norm(hidden))
    assert calls == ["norm", "norm"]
    restore_modules(model)
    assert "forward" not in vars(model.decoder.norm)
    assert "forward" in vars(twin.decoder.norm)
    assert install(model).norms == 5


def test_what_was_not_tried_is_computed_by_the_module() -> None:
    module = wrapped("llama").decoder
    use_kernels(module, RIGHT, dtype=torch.float32, device=CPU)
    calls.clear()
    found = module.norm(torch.ones(1, 2, 64, dtype=torch.bfloat16))
    assert found.dtype == torch.float32  # as the module's own: the weight is float32
    module.norm(hidden_states=torch.ones(1, 2, 64))
    module.norm(torch.ones(1, 0, 64))
    module.norm.weight = nn.Parameter(module.norm.weight.detach().double())
    module.norm(torch.ones(1, 2, 64))
    assert not calls
    module.norm.weight = nn.Parameter(torch.full((64,), 3.0))  # of now, not of the trial
    assert torch.allclose(module.norm(torch.ones(1, 2, 64)), torch.tensor(3.0))
    assert calls


RUNS = {
    "full": [],
    "bf16": ["model.dtype=bfloat16"],
    "lora": ["adapter=lora", "adapter.rank=4"],
    "recomputed": ["device.gradient_checkpointing=selective"],
    "held to its base": ["objective.kl=0.1"],
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return chat_inputs(tmp_path_factory.mktemp("kernels"), held_out=2)


@pytest.mark.parametrize("kind", RUNS)
def test_runs_learn_the_same(
    kind: str, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "find_spec", lambda _: True)
    monkeypatch.setattr(provider_module, "_liger", lambda: RIGHT)
    plain = four_steps(given, tmp_path / "plain", *RUNS[kind])
    calls.clear()
    fused = four_steps(given, tmp_path / "fused", "device.kernels=liger", *RUNS[kind])
    assert calls
    rounding = 5e-3 if kind == "bf16" else 2e-5
    assert losses(fused) == pytest.approx(losses(plain), rel=rounding)
    one, two = weights(plain), weights(fused)
    assert one.keys() == two.keys()
    chosen = [json.loads((out / "machine.json").read_text())["chosen"] for out in (plain, fused)]
    assert [c["kernels"] for c in chosen] == [
        "torch", "Plain 1 for 5 of 5 norms and 2 of 2 gated units",
    ]  # fmt: skip


def test_a_run_and_its_resume_are_the_same_bits(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(provider_module, "find_spec", lambda _: True)
    monkeypatch.setattr(provider_module, "_liger", lambda: RIGHT)
    whole = four_steps(given, tmp_path / "whole", "device.kernels=liger")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step-4")
    tunesmith.resume(cut, progress=False)
    assert losses(cut) == losses(whole)
    one, two = weights(whole), weights(cut)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_kernels_that_are_not_installed_are_asked_for_in_vain(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "find_spec", lambda name: name == "triton" or None)
    with pytest.raises(RecipeError, match="need liger_kernel, not installed here") as refused:
        four_steps(given, tmp_path / "run", "device.kernels=liger")
    assert refused.value.exit_code == 2
    assert "tunesmith[cuda]" in str(refused.value.hint)
    calls.clear()
    four_steps(given, tmp_path / "auto", "device.kernels=auto")
    assert not calls


def test_a_model_of_the_callers_has_its_own_forward_back(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny import tiny_tokenizer

    monkeypatch.setattr(provider_module, "find_spec", lambda _: True)
    monkeypatch.setattr(provider_module, "_liger", lambda: RIGHT)
    model = tiny_model("llama", num_hidden_layers=2)
    calls.clear()
    tunesmith.train(
        model=model, tokenizer=tiny_tokenizer(), data=given["data"], out=tmp_path / "run",
        overrides=["train.steps=1", "device.kernels=liger"], progress=False,
    )  # fmt: skip
    assert calls
    assert not any("forward" in vars(module) for module in model.modules())
