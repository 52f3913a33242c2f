"""Chat templates: loaded, sandboxed, and probed for turn ends."""
