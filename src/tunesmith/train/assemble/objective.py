"""The loss head with the objective of the recipe."""

from __future__ import annotations

import functools

from tunesmith.config.schema import Recipe
from tunesmith.objectives import OBJECTIVES, head_loss
from tunesmith.types import HeadLoss


def make_head_loss(recipe: Recipe) -> HeadLoss:
    """The head that computes the objective of the recipe."""
    return functools.partial(head_loss, objective=OBJECTIVES[recipe.objective.name])
