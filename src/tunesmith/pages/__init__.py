"""Self-contained HTML pages, in which text of the data is always escaped."""
