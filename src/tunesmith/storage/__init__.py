"""Run folder: lock, atomic file writes, file names."""
