"""Checkpoints: written beside the next steps, whole or not there, and resumed from to the bit."""
