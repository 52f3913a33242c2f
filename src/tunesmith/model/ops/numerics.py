"""Numerical equivalence: one measure of difference, and the bounds that rounding explains.

A fast way of computing is tried against a plain one before it is used: fused kernels, compiled
layers, float8 products, packed and shared layouts, context and tensor parallelism. All of these
trials measure by `relative_difference` and are held to the bounds of this page.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
