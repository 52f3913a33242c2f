"""From files to micro-batches: rows, formats, chat templates, tokens, packing and sampling."""
