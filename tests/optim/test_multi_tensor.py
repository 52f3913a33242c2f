"""Parameters that are updated together, against each by itself."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from optim_inputs import make_parameters, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.optim import SGD, Adafactor, AdamW, AdamW8bit, Lion, Muon, multi_tensor

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (64, 32),
    "one.weight": (96, 64),
    "two.weight": (96, 64),
    "three.weight": (96, 64),
    "four.weight": (64, 96),
    "one.bias": (96,),
    "two.bias": (96,),
    "experts": (4, 32, 64),
    "more.experts": (4, 32, 64),
    "gate": (2, 8),
}
RULES = {
    "adamw": AdamW, "adamw_8bit": AdamW8bit, "lion": Lion, "sgd": SGD, "adafactor": Adafactor,
    "muon": Muon,
}  # fmt: skip
TOLERANCE = {"adafactor": 1e-6, "muon": 2e-3}
"""Relative; sums of several parameters are taken in another order, and Muon's are of bfloat16."""
parameters = functools.partial(make_parameters, SHAPES)


def optimizers(rule: str, dtype: torch.dtype, **options: Any) -> tuple[Any, ...]:
    """One that updates parameters together and one that doesn't, each with its parameters."""
    made = []
    for joined in (True, False):
        named = parameters(dtype)
        optimizer = RULES[rule](
            named.items(), weight_decay=0.1, undecayed=("embed", "one.bias", "two.bias"),
            lr_factors={"two.weight": 3.0}, group_small=joined, **options,
        )  # fmt: skip
        made += [named, optimizer]
    return tuple(made)


def assert_same(rule: str, one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        if rule in TOLERANCE:
            wide = two[name].double()
            apart = float((one[name].double() - wide).norm() / wide.norm().clamp(min=1e-30))
            assert apart <= TOLERANCE[rule], (name, apart)
        else:
            assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_together_is_as_each_by_itself(rule: str, dtype: torch.dtype) -> None:
    named, together, others, apart = optimizers(rule, dtype)
    assert len(together._groups) >= 2
    assert not apart._groups
    for step in range(4):
        set_gradients(named, step)
        set_gradients(others, step)
        if step == 2:
            named["one.weight"].grad = others["one.weight"].grad = None
        before = [None if p.grad is None else p.grad.clone() for p in named.values()]
        together.step(1e-2, 0.7 if step else 1.0)
        apart.step(1e-2, 0.7 if step else 1.0)
        for parameter, grad in zip(named.values(), before, strict=True):
            assert grad is None or torch.equal(parameter.grad, grad)
    assert_same(rule, together.state_dict(), apart.state_dict())
    if rule not in TOLERANCE:
        assert all(torch.equal(named[name], others[name]) for name in named)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_goes_on_in_either_form(rule: str) -> None:
    named, together, others, apart = optimizers(rule, torch.bfloat16)
    for step in range(2):
        set_gradients(named, step)
        together.step(1e-2)
    state = {name: tensor.clone() for name, tensor in together.state_dict().items()}
    apart.load_state_dict(state)
    _, again, _, _ = optimizers(rule, torch.bfloat16)
    again.load_state_dict(state)
    assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)
    set_gradients(named, 5)
    set_gradients(others, 5)
    together.step(1e-2)
    apart.step(1e-2)
    assert_same(rule, together.state_dict(), apart.state_dict())


class Launches(TorchDispatchMode):
    """Counts operations that a device would be told of; views are none."""

    VIEWS = (
        "view", "detach", "slice", "select", "unsqueeze", "expand", "split", "split_with_sizes",
        "t", "transpose", "alias", "_unsafe_view", "empty", "empty_like", "as_strided", "squeeze",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function.overloadpacket.__name__
        if name not in self.VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES)
def test_launches_do_not_grow_with_the_number_of_parameters(rule: str) -> None:
    found = []
    for count in (4, 32):
        shapes = {f"layer.{number}.weight": (64, 128) for number in range(count)}
        named = make_parameters(shapes, torch.bfloat16)
        optimizer = RULES[rule](named.items(), group_small=True)
        for step in range(2):  # the first makes what is kept
            set_gradients(named, step)
            with Launches() as launches:
                optimizer.grad_norm()
                optimizer.step(1e-2, 0.5)
        found.append(sum(launches.counts.values()))
    assert found[0] == found[1] <= 60


def test_groups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "SMALL", 5000)
    monkeypatch.setattr(multi_tensor, "MOST", 10000)
    shapes = {f"{number}.weight": (40, 100) for number in range(7)} | {"large.weight": (80, 100)}
    optimizer = AdamW(make_parameters(shapes).items(), group_small=True)
    assert [len(group.members) for group, _ in optimizer._groups] == [2, 2, 2]
    assert sorted(param.flat.numel() for param in optimizer._alone) == [4000, 8000]


def test_memory_between_steps_is_the_same() -> None:
    _, together, _, apart = optimizers("adamw", torch.bfloat16)
    assert together.held_bytes == apart.held_bytes
    param = together._states["one.bias"]
    kept = [param.low_bits, *param.state.values()]
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    inside = {
        tensor.untyped_storage().data_ptr()
        for group, _ in together._groups
        for tensor in (group.low_bits, *group.state.values())
    }
    assert storages <= inside


def test_a_cpu_updates_one_parameter_at_a_time() -> None:
    assert not AdamW(parameters(torch.float32).items())._groups
    on_device = {name: p.to("meta") for name, p in parameters(torch.float32).items()}
    assert AdamW(on_device.items())._groups
