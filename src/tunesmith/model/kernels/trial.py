"""Trial of fused kernels: each variant is compared with the module's own forward and gradients on
made-up input.

A module is tried by a stand-in: the same object with weights of its own, drawn at random, and
linear maps that hand their part of the input through. So it does not matter where its weights are,
whether they are quantised, adapted, in parts on other ranks or not read yet.

Letters: n rows, D width of a norm, I width of a gated unit.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.kernels.provider import Provider
from tunesmith.model.ops.numerics import (
    ONE_OPERATION,
    SAME_FUNCTION,
    Comparison,
    equivalence_trial,
)

OFFSETS = (0.0, 1.0)
CASTINGS = ("llama", "gemma", "none")
ROUNDING = {**ONE_OPERATION, torch.float32: SAME_FUNCTION}
"""Bounds of a row."""
ROWS = (67, 33_000)
"""Of a trial; the second for narrow norms, for which Liger takes another kernel where there are
many rows.
"""
NARROW = 256

Compute = Callable[..., Tensor]
"""What replaces a forward: takes the module and its input."""


def norm_eps(module: nn.Module) -> str | None:
    """The name of the attribute that holds its epsilon, if the module looks like a norm: one vector
    of weights, nothing below it, and a forward of one argument.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or set(module._parameters) != {"weight"}:
        return None
    if module._modules or module._buffers or not _takes_one(module):
        return None
    names = ("variance_epsilon", "eps", "epsilon")
    return next((n for n in names if isinstance(getattr(module, n, None), float)), None)


def is_gated_unit(module: nn.Module) -> bool:
    """Whether it looks like down(activation(gate(x)) * up(x)) and nothing else."""
    below = {"gate_proj", "up_proj", "down_proj"}
    found = set(module._modules) - {"act_fn"}
    direct = any(p is not None for p in (*module._parameters.values(), *module._buffers.values()))
    return found == below and not direct and callable(getattr(module, "act_fn", None)) and (
        _takes_one(module)
    )  # fmt: skip


def _takes_one(module: nn.Module) -> bool:
    """Whether forward takes one argument, and is the class's own."""
    if "forward" in module.__dict__:
        return False
    return len(inspect.signature(type(module).forward).parameters) == 2


def kind_of(module: nn.Module, dtype: torch.dtype) -> Hashable:
    """Modules of one kind compute the same function of input and weight."""
    weight = module._parameters.get("weight")
    shape = () if weight is None else (tuple(weight.shape), weight.dtype, weight.requires_grad)
    acting = getattr(module, "act_fn", None)
    below = (type(acting), _scalars(acting)) if isinstance(acting, nn.Module) else acting
    return type(module), dtype, shape, _scalars(module), below


def _scalars(module: Any) -> tuple[tuple[str, Any], ...]:
    simple = (bool, int, float, str, type(None))
    skipped = ("training", "layer_idx")
    held = sorted(vars(module).items())
    return tuple((k, v) for k, v in held if isinstance(v, simple) and k not in skipped)


def norm_variants(kernels: Provider, eps: str) -> dict[str, Compute]:
    """Every way of the norm's kernel, by name."""

    def variant(offset: float, casting: str) -> Compute:
        def compute(module: Any, hidden: Tensor) -> Tensor:
            return kernels.norm(hidden, module.weight, getattr(module, eps), offset, casting)

        return compute

    return {f"{offset:g} {casting}": variant(offset, casting)
            for offset in OFFSETS for casting in CASTINGS}  # fmt: skip


def gate_variants(kernels: Provider) -> dict[str, Compute]:
    """Every activation that there is a kernel for, by name."""

    def variant(gate: Callable[[Tensor, Tensor], Tensor]) -> Compute:
        def compute(module: Any, hidden: Tensor) -> Tensor:
            return module.down_proj(gate(module.gate_proj(hidden), module.up_proj(hidden)))

        return compute

    return {name: variant(gate) for name, gate in kernels.gates.items()}


def nearest(
    module: nn.Module, variants: dict[str, Compute], dtype: torch.dtype, device: torch.device
) -> tuple[Compute | None, str]:
    """The variant that agrees with the module, or None and why none does; of several that do, the
    one whose output is nearest, since gradients of all differ by their rounding.

    In float32 first, where functions that are nearly the same differ, then in `dtype`.
    """
    outputs = dict.fromkeys(variants, 0.0)
    many = norm_eps(module) is not None and _width(module) <= NARROW
    for precision in dict.fromkeys((torch.float32, dtype)):
        if precision not in ROUNDING:
            return None, f"there is no kernel for {precision}"
        for rows in ROWS if many else ROWS[:1]:
            expected = _tried(type(module).forward, module, precision, device, rows)
            verdicts = {
                name: equivalence_trial(
                    functools.partial(
                        _compared, variants[name], module, precision, device, rows, expected
                    )
                )
                for name in outputs
            }
            agree = [name for name, verdict in verdicts.items() if verdict.problem is None]
            if not agree:
                nearest_one = min(verdicts.values(), key=lambda verdict: verdict.excess)
                return None, str(nearest_one.problem)
            outputs = {name: max(outputs[name], verdicts[name].excesses[0]) for name in agree}
    best = min(outputs, key=lambda name: outputs[name])
    return variants[best], best


def _width(module: nn.Module) -> int:
    """D of a norm, I of a gated unit."""
    weight = module._parameters.get("weight")
    if weight is not None:
        return int(weight.shape[0])
    up: Any = module._modules["up_proj"]
    return int(getattr(up, "out_features", 0)) or int(up.weight.shape[0])


class _Part(nn.Module):
    """Hands columns of its input through."""

    def __init__(self, start: int, stop: int | None) -> None:
        super().__init__()
        self.columns = slice(start, stop)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., self.columns].clone()  # a kernel may write over it


def _stand_in(
    module: nn.Module, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> nn.Module:
    made = copy.copy(module)
    width = _width(module)
    if made._parameters.get("weight") is None:
        acting = {k: m for k, m in module._modules.items() if k == "act_fn"}
        parts = {"gate_proj": _Part(0, width), "up_proj": _Part(width, None),
                 "down_proj": _Part(0, None)}  # fmt: skip
        made.__dict__["_modules"] = {**parts, **acting}
        return made
    original = module._parameters["weight"]
    assert original is not None
    kept = original.dtype if dtype != torch.float32 else dtype
    weight = torch.randn(width, generator=generator).add_(0.5).to(device, kept)
    trained = nn.Parameter(weight, requires_grad=original.requires_grad)
    made.__dict__["_parameters"] = {"weight": trained}
    return made


def _tried(
    compute: Compute, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int
) -> list[Tensor]:
    """Output and gradients of input and weight, [n, ...] each."""
    generator = torch.Generator().manual_seed(0)
    made = _stand_in(module, dtype, device, generator)
    width = _width(module) * (2 if norm_eps(module) is None else 1)
    drawn = torch.randn(1, rows, width, generator=generator)
    if norm_eps(module) is not None:  # small rows, of which epsilon is a part
        drawn *= 10 ** (4 * torch.rand(1, rows, 1, generator=generator) - 3)
    hidden = drawn.to(device, dtype).requires_grad_()
    with torch.enable_grad():
        output = compute(made, hidden)
        toward = torch.randn(output.shape, generator=generator).to(device, output.dtype)
        output.backward(toward)
    weight = made._parameters.get("weight")
    gradients = [hidden.grad, None if weight is None else weight.grad]
    return [output.detach(), *(g for g in gradients if g is not None)]


def _compared(
    compute: Compute, module: nn.Module, dtype: torch.dtype, device: torch.device, rows: int,
    expected: Sequence[Tensor],
) -> list[Comparison]:  # fmt: skip
    """Output and gradients of a variant, each row held to the module's own."""
    found = _tried(compute, module, dtype, device, rows)
    if [tensor.dtype for tensor in found] != [tensor.dtype for tensor in expected]:
        raise TypeError(f"it gives {found[0].dtype} where the module gives {expected[0].dtype}")
    pairs = zip(found, expected, strict=True)
    return [Comparison(one, other, ROUNDING[dtype], rows=True) for one, other in pairs]
