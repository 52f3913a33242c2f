"""Metrics: records, console, experiment trackers, machine description."""
