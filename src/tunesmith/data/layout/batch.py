"""A planned micro-batch as tensors on its device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.layout.packing import MicrobatchPlan
from tunesmith.types import Batch


def collate(plan: MicrobatchPlan, device: torch.device | str = "cpu") -> Batch:
    """The plan's arrays as tensors; ids and positions as int64, weights as float32."""

    def tensor(array: NDArray[np.int32]) -> torch.Tensor:
        return torch.as_tensor(array.astype(np.int64)).to(device, non_blocking=True)

    return Batch(
        input_ids=tensor(plan.ids),
        position_ids=tensor(plan.layout.position[plan.layout.own]),
        layout=plan.layout if plan.packed else None,
        source=tensor(plan.source),
        target=tensor(plan.target),
        weight=torch.as_tensor(plan.weight).to(device, non_blocking=True),
        shares=plan.shares,
    )
