"""float8 training of linear layers with rowwise scaling (torchao's float8 recipe; arXiv
2209.05433).

A token's row has a scale of its own, and so has each row of the weight, so that no row's result
depends on what is computed beside it (P2), as it would with one scale for a whole tensor. Gradients
of weights are multiplied in the model's own precision: there the rows that are added up would share
a scale. So two of three products are in float8, and with a frozen base all. This is the arithmetic
that torchao calls rowwise_with_gw_hp. Where documents share tokens, the sum of these tokens'
gradients is rounded, and not each: by so much, a part of float8's own rounding, sharing shows.

All scales are powers of two: to multiply by them rounds nothing. Outside of training (evaluation,
samples, what is exported) the maps multiply as any other.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model.ops.numerics import ONE_OPERATION, Comparison, equivalence_trial
from tunesmith.module_swap import ModuleSwap

SWAP = ModuleSwap("float8")
E4M3 = torch.float8_e4m3fn
MULTIPLE = 16
"""What both sides of a weight must be divisible by for the products of a GPU."""
CAPABILITY = (8, 9)
"""Of the first GPUs with such products."""
ROUNDING = ONE_OPERATION[torch.float16]
"""Bound of a trial against the same float8 numbers multiplied in float32. It is tighter than that
of bfloat16 results, since sums are in float32 on both sides.
"""
_LEAST = 1e-12

Cast = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


class Float8Linear(nn.Linear):
    """A linear map that multiplies in float8 in training mode; its weight stays what it is."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias)  # pyright: ignore


def use_float8(model: nn.Module, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Let the linear maps of these names multiply in float8; returns the names of those that do,
    and of those that can't for their sizes or kind.
    """
    done: list[str] = []
    left: list[str] = []
    for name in names:
        module = model.get_submodule(name)
        sizes = getattr(module, "in_features", 1), getattr(module, "out_features", 1)
        if type(module) is nn.Linear and not any(size % MULTIPLE for size in sizes):
            SWAP.set_class(module, Float8Linear)
            done.append(name)
        else:
            left.append(name)
    return done, left


def to_float8(values: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
    """The rows [M, K] in e4m3, and what each has to be multiplied by again, [M, 1]: a power of two;
    one for all rows if they are scaled as a `whole`.
    """
    size = values.abs()
    most = size.amax() if whole else size.amax(-1, keepdim=True)
    limit = torch.finfo(E4M3).max
    # in float64, so that the power of two is the same however this is compiled
    scale = torch.exp2(torch.floor(torch.log2(limit / most.double().clamp(min=_LEAST)))).float()
    scaled = (values.float() * scale).clamp(-limit, limit).to(E4M3)
    return scaled, scale.reciprocal().expand(len(values), 1)


def multiply(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Tensor:
    """[M, N] of rows [M, K] and rows [N, K] in float8 with their factors; on a CPU in float32."""
    (rows, factor), (columns, other_factor) = one, other
    if rows.device.type == "cpu":
        product = rows.float() @ columns.float().T
    else:
        unit = torch.ones((), device=rows.device)
        product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows, columns.T, unit, unit, out_dtype=dtype
        )
    # The product itself may be kept for a recomputation, and has to stay as it is. A power of two
    # is the same number in each precision.
    product = product * factor.to(product.dtype)
    return product.mul_(other_factor.T).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = _cast(input.device.type)
        rows = input.reshape(-1, input.shape[-1])
        output = multiply(cast(rows, False), cast(weight, False), input.dtype)
        if bias is not None:
            output = output + bias
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(weight, input)
        else:
            ctx.save_for_backward(weight)
        return output.view(*input.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        grad, need = grads[0], ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        cast = _cast(grad.device.type)
        of_input = of_weight = None
        if need[0]:
            plain, factor = cast(weight, True)
            turned = plain.T.contiguous(), factor[:1].expand(plain.shape[1], 1)
            of_input = multiply(cast(rows, False), turned, grad.dtype)
            of_input = of_input.view(*grad.shape[:-1], -1)
        if need[1]:
            of_weight = rows.T @ inputs[0].reshape(-1, inputs[0].shape[-1])
        return of_input, of_weight, rows.sum(0) if need[2] else None


@functools.cache
def _cast(device: str) -> Cast:
    """`to_float8`, on a GPU in one pass where a compiled one shows itself right."""
    if device == "cpu":
        return to_float8
    compiled = torch.compile(to_float8, dynamic=True)
    problem = equivalence_trial(lambda: _compared_casts(compiled, torch.device(device))).problem
    if problem is None:
        return compiled
    warnings.warn(f"float8 is made without a compiled kernel: {problem}", stacklevel=2)
    return to_float8


def check_device(device: torch.device) -> None:
    """Multiply small matrices there, and hold the results to the same numbers in float32.

    Raises:
        ModelError: the device has no such products, or other ones.
    """
    hint = "model.float8=none"
    if device.type != "cuda":
        raise ModelError(
            f"products in float8 need a GPU by NVIDIA with capability {CAPABILITY[0]}."
            f"{CAPABILITY[1]}, and this run is on {device.type}",
            where="model.float8", hint=hint,
        )  # fmt: skip
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ModelError(
            f"this GPU has capability {capability[0]}.{capability[1]}, and products in float8 need "
            f"{CAPABILITY[0]}.{CAPABILITY[1]}",
            where="model.float8", hint=hint,
        )  # fmt: skip
    problem = equivalence_trial(lambda: _compared_products(device)).problem
    if problem is not None:
        raise ModelError(f"float8 doesn't work on {device}: {problem}", where="model.float8",
                         hint=hint)  # fmt: skip


def _samples(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((53, 96), (64, 96), (53, 64))
    made = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    made[0][0] *= 100  # rows of different sizes
    return made


def _compared_casts(compiled: Cast, device: torch.device) -> Iterator[Comparison]:
    for values in _samples(device):
        for whole in (False, True):
            pairs = zip(compiled(values, whole), to_float8(values, whole), strict=True)
            yield from (Comparison(one, other, ROUNDING) for one, other in pairs)


def _compared_products(device: torch.device) -> Iterator[Comparison]:
    """Output and gradients on the device, against those on the CPU, in each precision."""
    for dtype in (torch.bfloat16, torch.float32):
        input, weight, grad = _samples(device, dtype)
        results: list[list[Tensor]] = []
        for place in (device, torch.device("cpu")):
            inputs = [t.detach().to(place).requires_grad_() for t in (input, weight)]
            output: Any = _Product.apply(*inputs, None)  # pyright: ignore
            gradients = torch.autograd.grad(output, inputs, grad.to(place))
            results.append([t.float().cpu() for t in (output.detach(), *gradients)])
        yield from (Comparison(one, other, ROUNDING) for one, other in zip(*results, strict=True))
