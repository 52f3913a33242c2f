"""The collator: a planned micro-batch as torch tensors on its device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.microbatch.planner import MicrobatchPlan
from tunesmith.transfer import to_device
from tunesmith.types import Batch


def collate(plan: MicrobatchPlan, device: torch.device | str = "cpu") -> Batch:
    """The plan's arrays as tensors on the device; ids and positions as int64, weights as
    float32.
    """

    def tensor(array: NDArray[np.int32]) -> torch.Tensor:
        return to_device(array.astype(np.int64), device)

    return Batch(
        input_ids=tensor(plan.ids),
        position_ids=tensor(plan.layout.position[plan.layout.local]),
        layout=plan.layout if plan.packed else None,
        source=tensor(plan.source),
        target=tensor(plan.target),
        weight=to_device(plan.weight, device),
        owners=plan.owners,
    )
