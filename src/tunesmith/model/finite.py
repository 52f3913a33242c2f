"""Finds weights with NaN or infinite values in a model."""

from __future__ import annotations

import torch

from tunesmith.errors import NonFiniteError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.weight_files import file_name

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse_non_finite(model: CausalLM, name: str) -> None:
    """Every answer and loss of such a model would be no number, or look like one.

    One pass that reads each weight once and makes nothing of its size: the least and the largest
    value of a tensor are NaN where it holds one.

    Raises:
        NonFiniteError: a weight holds such values; its name in the model's files.
    """
    for key, parameter in model.named_parameters():
        if parameter.dtype not in _FLOATS or not parameter.numel():
            continue
        least, largest = parameter.detach().aminmax()
        if not (torch.isfinite(least) and torch.isfinite(largest)):
            raise NonFiniteError(
                f"weight {file_name(key)} holds values that are no numbers (NaN or infinite)",
                where=name,
                hint="get the model anew; of a run of your own, use an earlier checkpoint",
            )
