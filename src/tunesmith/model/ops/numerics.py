"""Numerical equivalence trials: a fast way of computing is compared with a plain one before it is
used, by one measure and within the bounds that rounding explains.

Fused kernels, compiled layers, float8 products, packed and shared layouts, context and tensor
parallelism are all tried by `equivalence_trial`, measured by `relative_difference`, and held to the
bounds of this page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.errors import first_line

NARROW = (torch.bfloat16, torch.float16)
"""dtypes of 16 bits, in which rounding alone can send a token to another expert of an MoE layer."""

ONE_OPERATION = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Bounds for one kernel or one decoder layer, relative. Kernels sum in another order and round
intermediate results at other places: about 10 units in the last place of bfloat16 (2**-8) and of
float16 (2**-11), and TF32 products (2**-11) in float32.
"""

SAME_FUNCTION = 5e-5
"""Bound in float32 where two functions that are nearly the same must be told apart, such as exact
GELU and its tanh approximation.
"""

_WHOLE_MODEL = {"cpu": 2e-4, "other": 5e-3, "narrow": 8e-2}

_TINY = 1e-30  # a reference of zero equals zero


def whole_model_bound(dtype: torch.dtype, device: torch.device) -> float:
    """The bound for hidden states after all layers, through which rounding adds up, relative.

    float32 products may be TF32 on a GPU, which has 10 bits of mantissa instead of 23.
    """
    if dtype in NARROW:
        return _WHOLE_MODEL["narrow"]
    return _WHOLE_MODEL["cpu" if device.type == "cpu" else "other"]


def relative_difference(
    found: Tensor, expected: Tensor, *, rows: bool = False, robust: bool = False
) -> float:
    """|found - expected| / |expected| in float32, with Euclidean norms.

    By default over all values. With `rows` it is the largest over the rows of the last dimension;
    with `robust` the median over them, which a single token that took another expert does not move.
    Infinite where it is not a number.
    """
    wanted = expected.to(found.device).float()
    dim = -1 if rows or robust else None
    each = (found.float() - wanted).norm(dim=dim) / wanted.norm(dim=dim).clamp(min=_TINY)
    value = float(each.median() if robust else each.nan_to_num(nan=math.inf).max())
    return math.inf if math.isnan(value) else value


@dataclass(frozen=True, slots=True)
class Comparison:
    """A result, the one it must equal, and the relative difference that rounding explains.

    `rows` and `robust` are those of `relative_difference`.
    """

    found: Tensor
    expected: Tensor
    bound: float
    rows: bool = False
    robust: bool = False

    @property
    def excess(self) -> float:
        """The difference in multiples of the bound; infinite where the shapes differ."""
        if self.found.shape != self.expected.shape:
            return math.inf
        apart = relative_difference(self.found, self.expected, rows=self.rows, robust=self.robust)
        return apart / self.bound


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a trial found: each difference in multiples of its bound, or why it could not be run."""

    excesses: tuple[float, ...]
    error: str | None = None

    @property
    def excess(self) -> float:
        """The largest of the differences; infinite where the trial could not be run."""
        return math.inf if self.error is not None else max(self.excesses, default=0.0)

    @property
    def problem(self) -> str | None:
        """Why the fast way must not be used; None where it may."""
        if self.error is not None or self.excess <= 1:
            return self.error
        return f"it differs by {self.excess:.1e} times what rounding explains"


def equivalence_trial(
    compare: Callable[[], Iterable[Comparison]],
    *,
    catch: tuple[type[Exception], ...] = (Exception,),
) -> Verdict:
    """Run a fast way and a plain one, and hold each result to its bound.

    `compare` runs both. What it raises of the classes `catch` is the verdict's error: compilers and
    drivers raise whatever they like, and the plain way is still there.
    """
    try:
        return Verdict(tuple(one.excess for one in compare()))
    except catch as error:
        return Verdict((), first_line(error))
