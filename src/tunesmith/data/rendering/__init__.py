"""Rendering: examples to token ids and targets, faithful to inference."""
