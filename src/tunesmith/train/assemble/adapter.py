"""Which parameters are trained."""

from __future__ import annotations

import torch

from tunesmith.config.schema import Recipe
from tunesmith.model.adapters import AdapterReport, add_lora, full_report
from tunesmith.model.causal_lm import CausalLM


def choose_trained(recipe: Recipe, model: CausalLM) -> AdapterReport:
    adapter = recipe.adapter
    if adapter.kind == "lora":
        report = add_lora(
            model,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            targets=adapter.targets,
        )
    else:
        report = full_report(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32  # micro-batches are added up in float32
    return report
