"""The most memory that this process has held."""

from __future__ import annotations

import resource


def peak_memory() -> int:
    """Bytes: of the GPU's allocator where there is a GPU, else of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
