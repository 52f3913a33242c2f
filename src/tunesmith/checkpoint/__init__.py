"""Checkpoints: atomic, sharded, written in the background, resumed bitwise."""
