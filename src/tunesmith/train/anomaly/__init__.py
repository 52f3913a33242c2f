"""Anomalies of a run: non-finite steps, spikes, incident records."""
