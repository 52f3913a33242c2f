"""Peak memory of a piece of work, from torch's allocator statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(slots=True)
class Footprint:
    """Bytes above what was held before: what stayed at the end, and the most in between."""

    held: int = 0
    peak: int = 0


@contextmanager
def footprint(device: torch.device | str) -> Iterator[Footprint]:
    """Count what is allocated inside; the numbers are there on leaving.

    On CUDA the allocator's own counters are read (and its peak reset); on a CPU the profiler's
    memory events are added up, which no other thread of torch may run beside. Elsewhere both stay
    zero.
    """
    found, device = Footprint(), torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.held = torch.cuda.memory_allocated(device) - before
        found.peak = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            yield found
        for size in _changes(recorded.profiler):
            found.held += size
            found.peak = max(found.peak, found.held)
    else:
        yield found


def _changes(profiler: Any) -> list[int]:
    """Bytes taken (above 0) and given back (below), in order of time."""
    events = profiler.kineto_results.events() if profiler else []
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
