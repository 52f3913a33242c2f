"""The recipe's sections, a file each."""
