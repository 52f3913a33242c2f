"""Sampling: which documents each optimizer step learns from."""
