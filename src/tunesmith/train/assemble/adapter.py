"""Which parameters are trained."""

from __future__ import annotations

import torch

from tunesmith.config.schema import Recipe
from tunesmith.model.adapters import AdapterReport, AdapterSpec, add_adapter, full_report
from tunesmith.model.causal_lm import CausalLM


def choose_trained(recipe: Recipe, model: CausalLM) -> AdapterReport:
    adapter = recipe.adapter
    if adapter.kind == "lora":
        report = add_adapter(
            model,
            AdapterSpec(
                rank=adapter.rank,
                alpha=adapter.alpha,
                dropout=adapter.dropout,
                targets=adapter.targets,
            ),
            asked=("rank", "alpha"),
        )
    else:
        report = full_report(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32  # micro-batches are added up in float32
    return report
