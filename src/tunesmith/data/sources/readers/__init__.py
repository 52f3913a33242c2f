"""Streaming readers, one module for each file format; no file is held in memory as a whole."""
