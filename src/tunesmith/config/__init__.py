"""The recipe: its schema, how it is read, checked, changed and written."""
