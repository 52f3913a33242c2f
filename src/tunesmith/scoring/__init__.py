"""What a model makes of each row, kept in a file, and data sets chosen by it."""
