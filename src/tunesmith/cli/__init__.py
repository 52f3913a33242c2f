"""Command line: the subcommands of `tunesmith`."""
