"""The checks, by subject. Each takes the corpus, or the setup too, and returns an Outcome."""
