"""Field accounting: which columns and message fields each format reads, and what becomes of others."""
