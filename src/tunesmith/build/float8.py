"""float8 linear layers (rowwise scaling, as torchao's): which modules of the model get them."""

from __future__ import annotations

from tunesmith.config.schema import Recipe
from tunesmith.errors import RecipeError
from tunesmith.model.adapters.targets import candidates
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.kernels import float8


def use_float8(recipe: Recipe, model: CausalLM) -> list[str]:
    """Let the decoder's linear maps multiply in float8 if the recipe says so; what is said of it.

    Embedding, head, routers and tensors of experts stay as they are.

    Raises:
        RecipeError: there is no such map.
    """
    if recipe.model.float8 == "none":
        return []
    found = candidates(model)
    done, left = float8.use_float8(model.base, found.linear)
    if not done:
        raise RecipeError(
            f"{model.config.model_type} has no linear map that could multiply in float8",
            where="model.float8",
            hint="model.float8=none",
        )
    inside = sum(model.base.get_submodule(name).weight.numel() for name in done)
    share = inside / sum(parameter.numel() for parameter in model.base.parameters())
    said = f"float8: {len(done)} linear maps, {share:.0%} of the weights, multiply in 8 bits while "
    said += "training; evaluation and what is exported do not"
    if left:
        multiple = float8.MULTIPLE
        said += f"; {len(left)} are left, of sizes that {multiple} does not divide: {left[0]}"
    if found.experts:
        said += "; tensors of experts stay as they are"
    return [said]
