"""float32 master weights in two halves: the bf16 parameter and the 16 low bits that it lacks.

A bfloat16 parameter is one half of its float32 master: the parameter holds the upper 16 bits,
rounded to nearest with halves away from zero, and an int16 tensor holds what the rounding took
away. Joined they are the master to the last bit, in 2 + 2 bytes instead of 2 + 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def join_master(upper: Tensor, low: Tensor, *, out: Tensor) -> Tensor:
    """float32 `out` [n] from its bfloat16 part and the int16 remainder of its rounding."""
    bits = out.view(torch.int32)
    bits.copy_(upper.view(torch.int16)).bitwise_left_shift_(16).add_(low)
    return out


def split_master_(master: Tensor, *, upper: Tensor, low: Tensor) -> None:
    """Inverse of `join`: writes `upper` bfloat16 and `low` int16 and destroys `master`; all [n].

    The remainder bits - (upper << 16) lies in [-32768, 32767] just because halves are rounded away
    from zero, and is then the lower 16 bits of the master read as a signed number.
    """
    bits = master.view(torch.int32)
    low.copy_(bits)
    upper.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))
