"""Memory of a training run: estimated, measured, fitted."""
