"""Data diagnosis before a run: a summary and many small checks."""
