"""Benchmark of a run on this machine, against the floor of its matrix products."""

from tunesmith.bench.measure import Bench, bench

__all__ = ["Bench", "bench"]
