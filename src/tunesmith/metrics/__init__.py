"""Records of a run, and where they go: metrics.jsonl, the console and trackers."""
