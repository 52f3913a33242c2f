from __future__ import annotations

import functools

import pytest
import torch
from optim_inputs import make_parameters, set_gradients
from torch import nn

from tunesmith.optim import AdamW, clip_factor, grad_norm, no_decay, undecayed
from tunesmith.optim import optimizer as masters

SHAPES = {"embed": (50, 16), "linear": (33, 16), "bias": (33,), "scalar": ()}
parameters = functools.partial(make_parameters, SHAPES)


def round_half_away(master):
    """The rule of the split form, by plain arithmetic on the magnitude's bits."""
    bits = master.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    upper = (bits + 0x8000) >> 16
    return torch.where(upper >= 0x8000, upper - 0x10000, upper).to(torch.int16).view(torch.bfloat16)


def test_equals_torch_on_float32():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    options = {"betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = AdamW(ours.items(), weight_decay=0.1, undecayed=("embed", "bias"), **options)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["linear"], theirs["scalar"]], "weight_decay": 0.1},
            {"params": [theirs["embed"], theirs["bias"]], "weight_decay": 0.0},
        ],
        foreach=False,
        **options,
    )
    for step in range(20):
        lr = 1e-2 / (step + 1)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for group in reference.param_groups:
            group["lr"] = lr
        optimizer.step(lr)
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=1e-7)


def test_bfloat16_is_float32_rounded_to_the_last_bit():
    split, master = parameters(torch.bfloat16), parameters(torch.float32)
    ours = AdamW(split.items(), weight_decay=0.1)
    reference = AdamW(master.items(), weight_decay=0.1)
    for step in range(30):
        set_gradients(split, step)
        set_gradients(master, step)
        ours.step(3e-3, grad_scale=0.7)
        reference.step(3e-3, grad_scale=0.7)
        for name in split:
            assert split[name].dtype == torch.bfloat16
            assert torch.equal(split[name], round_half_away(master[name].detach()))
    state, wanted = ours.state_dict(), reference.state_dict()
    assert state.keys() == wanted.keys()
    for name in state:
        assert torch.equal(state[name], wanted[name]), name


def test_float16_keeps_a_float32_master():
    half, full = parameters(torch.float16), parameters(torch.float32)
    ours, reference = AdamW(half.items()), AdamW(full.items())
    for step in range(10):
        set_gradients(half, step)
        set_gradients(full, step)
        ours.step(1e-4)
        reference.step(1e-4)
    for name in half:
        assert torch.equal(half[name], full[name].to(torch.float16))
        assert torch.equal(ours.state_dict()[f"master.{name}"], full[name])


@pytest.mark.parametrize("seed", range(3))
def test_split_and_join_are_inverse_for_every_kind_of_number(seed):
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000
    special = torch.tensor([0, -(2**31), 0x7F800000, 0x7F7FFFFF, 1, 0x3F80FFFF])
    master = torch.cat([bits, ties, special.to(torch.int32)]).view(torch.float32)
    master = master[torch.isfinite(master)]
    upper, low = (
        torch.empty_like(master, dtype=torch.bfloat16),
        torch.empty_like(master, dtype=torch.int16),
    )
    masters.split_master_(master.clone(), upper=upper, low=low)
    joined = masters.join_master(upper, low, out=torch.empty_like(master))
    assert torch.equal(joined.view(torch.int32), master.view(torch.int32))
    assert torch.equal(upper.view(torch.int16), round_half_away(master).view(torch.int16))


def test_memory_is_twelve_bytes_a_bfloat16_weight():
    weight = nn.Parameter(torch.zeros(1024, 64, dtype=torch.bfloat16))
    optimizer = AdamW([("w", weight)])
    param = optimizer._states["w"]
    held = [param.parameter, param.low_bits, *param.state.values()]
    assert sum(t.numel() * t.element_size() for t in held) == 12 * weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_change_a_bit(dtype, monkeypatch):
    results = []
    for chunk in (64, 256, 1 << 15):
        monkeypatch.setattr(masters, "CPU_CHUNK", chunk)
        named = parameters(dtype)
        optimizer = AdamW(named.items(), weight_decay=0.1)
        for step in range(3):
            set_gradients(named, step)
            optimizer.step(1e-2, grad_scale=0.5)
        results.append(optimizer.state_dict())
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_grad_scale_is_a_scaled_gradient_and_leaves_gradients_alone():
    scaled, plain = parameters(torch.float32), parameters(torch.float32)
    ours, reference = AdamW(scaled.items()), AdamW(plain.items())
    set_gradients(scaled, 1)
    before = {name: p.grad.clone() for name, p in scaled.items()}
    set_gradients(plain, 1)
    for parameter in plain.values():
        parameter.grad.mul_(0.25)
    ours.step(1e-2, grad_scale=0.25)
    reference.step(1e-2)
    for name in scaled:
        assert torch.equal(scaled[name], plain[name])
        assert torch.equal(scaled[name].grad, before[name])


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_inside_the_step_equals_torch(max_norm):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = AdamW(ours.items(), eps=1e-2)
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, eps=1e-2, weight_decay=0.0)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        norm = optimizer.grad_norm()
        limit = float("inf") if max_norm is None else max_norm
        wanted = torch.nn.utils.clip_grad_norm_(theirs.values(), limit)
        torch.testing.assert_close(norm, wanted)
        optimizer.step(1e-2, clip_factor(float(norm), max_norm))
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=1e-7)


def test_a_missing_gradient_is_zero():
    missing, zero = parameters(torch.bfloat16), parameters(torch.bfloat16)
    ours = AdamW(missing.items(), weight_decay=0.1)
    reference = AdamW(zero.items(), weight_decay=0.1)
    for step in range(4):
        set_gradients(missing, step)
        set_gradients(zero, step)
        if step % 2:
            missing["linear"].grad = None
            zero["linear"].grad.zero_()
        ours.step(1e-2)
        reference.step(1e-2)
    assert torch.equal(missing["linear"], zero["linear"])


def test_zero_grad_gives_the_memory_back():
    named = parameters(torch.bfloat16)
    optimizer = AdamW(named.items())
    ((named["linear"].float() ** 2).sum() + named["bias"].float().sum()).backward()
    assert named["linear"].grad.dtype == torch.float32
    optimizer.zero_grad()
    assert named["linear"].grad is None


def test_gradients_of_micro_batches_add_up_in_float32():
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    for _ in range(300):
        (weight * 1.0).sum().backward()
    assert weight.grad.item() == 300.0  # bfloat16 would stop at 256


@pytest.mark.parametrize("resumed", [torch.bfloat16, torch.float32])
def test_a_state_goes_on_exactly_in_either_form(resumed):
    first = parameters(torch.bfloat16)
    optimizer = AdamW(first.items(), weight_decay=0.1)
    for step in range(3):
        set_gradients(first, step)
        optimizer.step(1e-2)
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    other = parameters(resumed, seed=9)
    restored = AdamW(other.items(), weight_decay=0.1)
    restored.load_state_dict(saved)
    for step in range(3, 6):
        set_gradients(first, step)
        set_gradients(other, step)
        optimizer.step(1e-2)
        restored.step(1e-2)
    state, wanted = restored.state_dict(), optimizer.state_dict()
    assert int(state["steps"]) == 6
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_load_refuses_a_state_of_another_model():
    optimizer = AdamW(parameters(torch.float32).items())
    state = optimizer.state_dict()
    lacking = {name: tensor for name, tensor in state.items() if name != "exp_avg.bias"}
    with pytest.raises(KeyError, match=r"exp_avg\.bias"):
        optimizer.load_state_dict(lacking)
    with pytest.raises(ValueError, match="shape"):
        optimizer.load_state_dict({**state, "master.bias": torch.zeros(3)})


def test_frozen_parameters_are_left_out():
    named = parameters(torch.float32)
    named["embed"].requires_grad_(False)
    assert AdamW(named.items()).names == ("linear", "bias", "scalar")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.experts = nn.ParameterDict({"up": torch.zeros(2, 4, 6), "up_bias": torch.zeros(2, 6)})
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def test_norms_biases_and_embeddings_are_not_decayed():
    model = Block()
    names = {name for name, _ in model.named_parameters()}
    assert names - undecayed(model) == {"up.weight", "experts.up"}
    assert no_decay("x.bias", torch.zeros(3, 3))
    assert not no_decay("x.weight", torch.zeros(3, 3))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_what_decays_in_real_families(family):
    from tiny import tiny_model

    model = tiny_model(family)
    spared = undecayed(model)
    for name, parameter in model.named_parameters():
        kinds = ("norm", "bias", "embed_tokens", "sinks")
        assert (name in spared) == any(kind in name for kind in kinds), (name, parameter.shape)


def test_norm_and_clip_factor_equal_torch():
    named = parameters(torch.float32)
    set_gradients(named, 5)
    named["bias"].grad = None
    norm = grad_norm(named.values())
    factor = clip_factor(norm.item(), 1.5)
    scaled = [p.grad * factor for p in named.values() if p.grad is not None]
    wanted = torch.nn.utils.clip_grad_norm_(list(named.values()), 1.5)
    torch.testing.assert_close(norm, wanted)
    present = [p.grad for p in named.values() if p.grad is not None]
    torch.testing.assert_close(scaled, present)
    assert clip_factor(1.0, 1.5) == 1.0
    assert clip_factor(1e9, None) == 1.0
    assert grad_norm([nn.Parameter(torch.ones(2))]).item() == 0.0
