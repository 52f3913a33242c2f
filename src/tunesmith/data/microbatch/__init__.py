"""Micro-batches: the prefix tree of a step, cut into pieces and laid out."""
