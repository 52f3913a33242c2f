"""Supervised fine-tuning of language models that cannot be silently wrong."""

__version__ = "0.1.0"
