"""What is wrong with data before a run: a summary of it, and many small checks."""
