"""Training: the loop, the optimizer step, losses, evaluation, anomalies."""
