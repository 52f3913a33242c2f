"""Field accounting: what each format reads, and what becomes of other columns and fields."""
