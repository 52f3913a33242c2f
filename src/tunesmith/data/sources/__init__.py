"""Data sources: files, folders, patterns, hub data sets and Python iterables."""
