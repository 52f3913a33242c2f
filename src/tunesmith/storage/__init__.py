"""The run folder on the disk: its files, its lock and atomic writes."""
