"""The run folder: lock, atomic writes, file names."""
