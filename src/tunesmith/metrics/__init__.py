"""Metrics: records, console progress, experiment trackers."""
