"""Pages for a browser: one self-contained file each, in which no text of the data is markup."""
