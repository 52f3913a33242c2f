from __future__ import annotations

import functools

import pytest
import torch
from optim_inputs import make_parameters, set_gradients
from torch import nn

from tunesmith.optim import SGD, Adafactor, AdamW, AdamW8bit, Lion, Muon
from tunesmith.optim import optimizer as masters
from tunesmith.optim.adamw import dynamic_map

KINDS = [AdamW, AdamW8bit, Adafactor, Lion, Muon, SGD]
SHAPES = {"linear": (96, 64), "bias": (33,), "experts": (2, 8, 24), "tall": (5, 3)}


parameters = functools.partial(make_parameters, SHAPES)


def make(kind, named):
    return kind(named.items(), weight_decay=0.1)


def run(optimizer, named, steps, reference=None):
    for step in steps:
        set_gradients(named, step)
        optimizer.step(*(() if reference else (1e-2,)))


def round_half_away(master):
    bits = (master.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + 0x8000 >> 16
    return bits.to(torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_float32_rounded_to_the_last_bit(kind):
    split, full = parameters(torch.bfloat16), parameters()
    ours, reference = make(kind, split), make(kind, full)
    run(ours, split, range(6))
    run(reference, full, range(6))
    for name in split:
        assert torch.equal(split[name], round_half_away(full[name].detach()))
    state, wanted = ours.state_dict(), reference.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_on_to_the_bit(kind):
    first, other = parameters(torch.bfloat16), parameters(torch.bfloat16, seed=9)
    optimizer, restored = make(kind, first), make(kind, other)
    run(optimizer, first, range(3))
    restored.load_state_dict({k: v.clone() for k, v in optimizer.state_dict().items()})
    run(optimizer, first, range(3, 6))
    run(restored, other, range(3, 6))
    state, wanted = restored.state_dict(), optimizer.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_change_a_bit(kind, monkeypatch):
    results = []
    for chunk in (256, 1 << 15):
        monkeypatch.setattr(masters, "CPU_CHUNK", chunk)
        named = parameters()
        optimizer = make(kind, named)
        run(optimizer, named, range(3))
        results.append(optimizer.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_stay_and_undecayed_zero_gradients_change_nothing(kind):
    named = parameters()
    optimizer = make(kind, named)
    set_gradients(named, 1)
    before = {name: p.grad.clone() for name, p in named.items()}
    optimizer.step(1e-2)
    assert all(torch.equal(p.grad, before[name]) for name, p in named.items())
    fresh = parameters()
    start = {name: p.detach().clone() for name, p in fresh.items()}
    make(kind, fresh).step(1e-2)
    assert torch.equal(fresh["bias"], start["bias"])
    torch.testing.assert_close(fresh["linear"], start["linear"] * (1 - 1e-2 * 0.1))


def test_sgd_equals_torch_to_the_bit():
    ours, theirs = parameters(), parameters()
    run(SGD(ours.items(), momentum=0.9), ours, range(8))
    run(torch.optim.SGD(theirs.values(), lr=1e-2, momentum=0.9), theirs, range(8), True)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_lion_equals_its_formula_in_float64():
    named = parameters()
    weights = {name: p.detach().double() for name, p in named.items()}
    momentum = {name: torch.zeros_like(w) for name, w in weights.items()}
    optimizer = Lion(named.items(), betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(8):
        set_gradients(named, step)
        optimizer.step(1e-2)
        for name, p in named.items():
            grad, decay = p.grad.double(), 0.0 if name == "bias" else 0.1
            sign = torch.sign(0.9 * momentum[name] + 0.1 * grad)
            weights[name] -= 1e-2 * (sign + decay * weights[name])
            momentum[name] = 0.99 * momentum[name] + 0.01 * grad
    for name, p in named.items():
        torch.testing.assert_close(p.double(), weights[name], rtol=1e-6, atol=1e-6)


def test_adafactor_equals_transformers():
    from transformers.optimization import Adafactor as Theirs

    ours, theirs = parameters(), parameters()
    run(Adafactor(ours.items()), ours, range(8))
    options = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    run(Theirs(theirs.values(), lr=1e-2, **options), theirs, range(8), True)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_muon_equals_torch_on_matrices_and_adamw_elsewhere():
    ours, theirs, adam = parameters(), parameters(), parameters()
    run(Muon(ours.items(), weight_decay=0.1), ours, range(5))
    two = {name: p for name, p in theirs.items() if p.ndim == 2}
    reference = torch.optim.Muon(
        two.values(), lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    run(reference, theirs, range(5), True)
    run(AdamW(adam.items(), weight_decay=0.1), adam, range(5))
    for name in two:
        moved = (theirs[name] - parameters()[name]).norm()
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
        assert (ours[name] - adam[name]).norm() > 0.1 * moved
    assert torch.equal(ours["bias"], adam["bias"])


def test_muon_takes_each_expert_for_itself():
    stacked = {"e": nn.Parameter(torch.ones(2, 8, 24))}
    single = {name: nn.Parameter(torch.ones(8, 24)) for name in ("a", "b")}
    ours, reference = Muon(stacked.items()), Muon(single.items())
    grad = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))
    stacked["e"].grad = grad
    single["a"].grad, single["b"].grad = grad[0], grad[1]
    ours.step(1e-2)
    reference.step(1e-2)
    torch.testing.assert_close(stacked["e"], torch.stack(list(single.values())), rtol=0, atol=2e-4)


def test_eight_bit_moments_are_the_nearest_entries_and_follow_adamw():
    ours, exact = parameters(), parameters()
    optimizer, reference = make(AdamW8bit, ours), make(AdamW, exact)
    run(optimizer, ours, range(1))
    run(reference, exact, range(1))
    assert torch.equal(ours["linear"], exact["linear"])  # the first step reads zeros
    state, wanted = optimizer.state_dict(), reference.state_dict()
    assert state["exp_avg.linear"].dtype == torch.uint8
    for kind in ("exp_avg", "exp_avg_sq"):
        code = dynamic_map(signed=kind == "exp_avg").double()
        blocks = wanted[f"{kind}.linear"].double().view(-1, 256)
        scale = blocks.abs().amax(dim=1, keepdim=True)
        best = ((blocks / scale)[..., None] - code).abs().amin(dim=-1)
        chosen = code[state[f"{kind}.linear"].long()].view(-1, 256)
        assert torch.all((blocks / scale - chosen).abs() <= best + 1e-6)
        torch.testing.assert_close(state[f"{kind}_scale.linear"], scale.float().view(-1))
    run(optimizer, ours, range(1, 10))
    run(reference, exact, range(1, 10))
    moved = (exact["linear"] - parameters()["linear"]).norm()
    assert 0 < (ours["linear"] - exact["linear"]).norm() < 0.2 * moved
    assert torch.equal(ours["tall"], exact["tall"])  # small ones stay in float32


@pytest.mark.parametrize(
    ("kind", "most"), [(AdamW, 8), (AdamW8bit, 2.1), (Adafactor, 0.3), (Lion, 4), (Muon, 4)]
)
def test_bytes_of_the_state(kind, most):
    named = {"w": nn.Parameter(torch.zeros(256, 64))}
    state = make(kind, named)._states["w"].state
    held = sum(t.numel() * t.element_size() for t in state.values())
    assert 0.9 * most * named["w"].numel() * (kind is not Adafactor) <= held
    assert held <= most * named["w"].numel()


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_that_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    wanted = functional.create_dynamic_map(signed=signed)
    torch.testing.assert_close(dynamic_map(signed=signed), wanted, rtol=1e-6, atol=0)
