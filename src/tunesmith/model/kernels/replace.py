"""Replacement of modules' forwards by fused kernels, module by module.

Only `forward` of the single module is replaced: its class, its weights and their names stay, and so
does what is saved. A replaced module falls back to its own forward for what was not tried: another
precision, another device, weights that are in parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import RecipeError
from tunesmith.model.kernels.provider import KEY, Provider
from tunesmith.model.kernels.trial import (
    Compute,
    gate_variants,
    is_gated_unit,
    kind_of,
    nearest,
    norm_eps,
    norm_variants,
)
from tunesmith.model.ops.forward_override import replace_forward, restore_forwards

MARK = "computed_by_a_kernel"


@dataclass(frozen=True, slots=True)
class Replaced:
    """How many modules a kernel computes, of how many that look like it could."""

    kernels: str
    norms: int
    norms_seen: int
    units: int
    units_seen: int

    @property
    def text(self) -> str:
        """What a start says, and a resume must find the same."""
        return (
            f"{self.kernels} for {self.norms} of {self.norms_seen} norms and "
            f"{self.units} of {self.units_seen} gated units"
        )


def use_kernels(
    model: nn.Module,
    kernels: Provider,
    *,
    dtype: torch.dtype,
    device: torch.device,
    insist: bool = False,
) -> Replaced:
    """Let the kernels compute every norm and gated unit of the model whose kind they compute
    right, tried in `dtype` on `device`; kinds that they don't are warned of.

    Raises:
        RecipeError: they are insisted on, and there is no module that they compute.
    """
    found: dict[Hashable, tuple[Compute | None, str]] = {}
    seen, done = {"norm": 0, "unit": 0}, {"norm": 0, "unit": 0}
    problems: dict[str, None] = {}
    for module in list(model.modules()):
        variants = _variants(module, kernels)
        if variants is None:
            continue
        kind = kind_of(module, dtype)
        if kind not in found:
            found[kind] = nearest(module, variants, dtype, device)
        compute, why = found[kind]
        what = "norm" if norm_eps(module) else "unit"
        seen[what] += 1
        if compute is None:
            problems[f"{type(module).__name__}: {why}"] = None
            continue
        done[what] += 1
        _replace(module, compute, dtype, device)
    if insist and not any(done.values()):
        told = next(iter(problems), "it has no norm or gated unit of a known form")
        raise RecipeError(
            f"{kernels.name} computes nothing of this model: {told}", where=KEY,
            hint=f"{KEY}=auto",
        )  # fmt: skip
    for problem in problems:
        warnings.warn(f"{kernels.name} is not used for {problem}", stacklevel=2)
    return Replaced(kernels.name, done["norm"], seen["norm"], done["unit"], seen["unit"])


def restore_modules(model: nn.Module) -> None:
    """Undo `use_kernels`."""
    restore_forwards(model, MARK)


def _variants(module: nn.Module, kernels: Provider) -> dict[str, Compute] | None:
    eps = norm_eps(module)
    if eps is not None:
        return norm_variants(kernels, eps)
    return gate_variants(kernels) if is_gated_unit(module) else None


def _replace(module: nn.Module, compute: Compute, dtype: torch.dtype, device: torch.device) -> None:
    weight = module._parameters.get("weight")
    forward = _forward(compute, dtype, device.type, None if weight is None else weight.dtype)
    replace_forward(module, forward, MARK)


def _forward(
    compute: Compute, dtype: torch.dtype, device: str, kept: torch.dtype | None
) -> Callable[..., Tensor]:
    def forward(self: Any, *inputs: Any, **named: Any) -> Tensor:
        if len(inputs) == 1 and not named and inputs[0].dtype == dtype:
            hidden, weight = inputs[0], self._parameters.get("weight")
            whole = weight is None or (
                weight.dtype == kept
                and weight.device == hidden.device
                and type(weight) in (Tensor, nn.Parameter)  # another may be a part of a weight
            )
            if whole and hidden.device.type == device and hidden.numel():  # none can't be launched
                return compute(self, hidden)
        return type(self).forward(self, *inputs, **named)

    return forward
