"""A training run, from a recipe to a run folder with the model."""

from tunesmith.run.api import ranks_of, resume, train, train_recipe
from tunesmith.run.runner import Run

__all__ = ["Run", "ranks_of", "resume", "train", "train_recipe"]
