"""Attention over packed and tree-shaped micro-batches."""
