"""The optimizer over the trained parameters, and its learning rate."""

from __future__ import annotations

from tunesmith.config.schema import Recipe
from tunesmith.model.causal_lm import CausalLM
from tunesmith.optim import AdamW, undecayed


def make_optimizer(recipe: Recipe, model: CausalLM) -> AdamW:
    optim = recipe.optim
    return AdamW(
        model.named_parameters(),
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        undecayed=undecayed(model),
    )
