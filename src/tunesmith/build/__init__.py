"""From a recipe to a training job: every part is made and checked here."""
