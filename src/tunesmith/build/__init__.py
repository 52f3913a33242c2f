"""The parts of a job, each made from its section of the recipe."""
