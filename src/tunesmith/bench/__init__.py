"""How fast a run is on this machine, held against what the machine could do."""

from tunesmith.bench.measure import Bench, bench

__all__ = ["Bench", "bench"]
