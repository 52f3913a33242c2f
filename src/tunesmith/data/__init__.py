"""From rows to micro-batches: sources, formats, templates, rendering, packing, sampling."""
