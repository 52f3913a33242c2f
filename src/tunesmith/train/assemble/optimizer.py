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
        lr_factors=lr_factors(recipe, model),
    )


def lr_factors(recipe: Recipe, model: CausalLM) -> dict[str, float]:
    """What the learning rate of a parameter is multiplied by, by its name, where that isn't 1.

    LoRA+ (Hayou et al., arXiv 2402.12354) lets the B matrices learn faster than the A matrices.
    """
    ratio = recipe.adapter.lr_ratio
    if ratio is None:
        return {}
    return {
        name: ratio
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_B." in name
    }
