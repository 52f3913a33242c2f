"""Metric records of a run (JSON Lines): made, written to metrics.jsonl, and read back; and the
weighted quantiles they hold, from log-scale histograms, which add up over micro-batches and ranks.

A record is a flat mapping with `kind` train, eval or event, and the `step` it belongs to. Records
of kind eval have the name of their `set`, those of kind event have its name in `event`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.errors import InputError, RunError


class Sink(Protocol):
    """A destination of the records of a run."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record."""
        ...

    def close(self) -> None:
        """Finish writing; no record follows."""
        ...


class JsonlSink:
    """Appends each record as a line of JSON. A crash loses at most the line being written.

    NaN and infinity, which JSON doesn't have, are written as null.

    Args:
        path: the file. It is created if it doesn't exist.
        after_step: on resume, the step of the checkpoint. The file is truncated before the first
            record of a later step, and before an incomplete line.

    Raises:
        RunError: the file can't be written.
    """

    def __init__(self, path: Path, *, after_step: int | None = None) -> None:
        self.path = path
        try:
            if after_step is not None and path.exists():
                os.truncate(path, _length_up_to(path, after_step))
            self._file = open(path, "ab")  # noqa: SIM115 - held open until close()
        except OSError as error:
            raise RunError(f"can't be written: {error.strerror}", where=str(path)) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record.

        Raises:
            RunError: the disk is full or gone.
        """
        line = json.dumps(to_json(record), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self._file.write(line.encode())
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"can't be written: {error.strerror}",
                where=str(self.path),
                hint="free some space, then run `tunesmith resume`",
            ) from error

    def close(self) -> None:
        """Write the file to the disk (fsync) and close it.

        Raises:
            RunError: the disk is full or gone.
        """
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise RunError(f"can't be written: {error.strerror}", where=str(self.path)) from error


def read_records(path: Path, *, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl or samples.jsonl, of one kind or of all kinds.

    An incomplete last line, as a crash leaves it, is left out.

    Raises:
        InputError: the file is missing, or a line is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=str(path)) from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"is not JSON: {error}", where=f"{path} line {number}") from None
        if not isinstance(record, dict):
            raise InputError("is not a JSON object", where=f"{path} line {number}")
        if kind is None or record.get("kind") == kind:
            yield record


def to_json(value: Any) -> Any:
    """`value` with numpy and torch scalars as numbers and NaN or infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if not isinstance(value, float) and hasattr(value, "item"):
        return to_json(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


class Evaluated(Protocol):
    """The means of an evaluation, as `train.evaluate.EvalResult` has them."""

    @property
    def nll(self) -> float: ...
    @property
    def perplexity(self) -> float: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def entropy(self) -> float: ...
    @property
    def documents(self) -> int: ...
    @property
    def target_tokens(self) -> int: ...


def eval_record(
    found: Evaluated, *, step: int, epoch: float, name: str, content_hash: str, seconds: float
) -> dict[str, Any]:
    """The record of a held-out set: means over its targets, in nats."""
    return {
        "kind": "eval",
        "step": step,
        "epoch": epoch,
        "set": name,
        "content_hash": content_hash,
        "rows": found.documents,
        "target_tokens": found.target_tokens,
        "nll": found.nll,
        "perplexity": found.perplexity,
        "accuracy": found.accuracy,
        "entropy": found.entropy,
        "seconds": seconds,
    }


def interrupted_record(step: int, *, signal_name: str) -> dict[str, Any]:
    """The record of a run that a signal stopped."""
    return {"kind": "event", "event": "interrupted", "signal": signal_name, "step": step}


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _length_up_to(path: Path, step: int) -> int:
    length = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not isinstance(record, dict) or (record.get("step") or 0) > step:
                break
            length += len(line)
    return length


LOWEST, HIGHEST, PER_UNIT = -8, 40, 8
"""Range of the histograms in natural logarithms, and bins per unit: a bin is 13% wide."""
SHOWN = (0.5, 0.9, 0.99)
EMPTY_HISTOGRAM = np.zeros((2, (HIGHEST - LOWEST) * PER_UNIT))
"""A histogram of no values, to which others are added."""


def log_histogram(
    values: NDArray[np.floating], weight: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The histogram of values that are natural logarithms.

    Returns:
        [2, bins]: the sum of weights, and the sum of weight * value. Values outside the range are
        clipped to it.
    """
    bins = (HIGHEST - LOWEST) * PER_UNIT
    bounded = np.clip(values, LOWEST, HIGHEST)
    places = np.minimum(((bounded - LOWEST) * PER_UNIT).astype(np.int64), bins - 1)
    sums = [np.bincount(places, weights=w, minlength=bins) for w in (weight, weight * bounded)]
    return np.stack(sums).astype(np.float64)


def quantiles(
    histogram: NDArray[np.float64], shares: Sequence[float] = SHOWN
) -> dict[float, float]:
    """The values (exp of the logarithms) below which the shares of the weight lie.

    Each is the weighted mean of the bin in which the quantile falls. Empty without weight.
    """
    weight, summed = histogram
    reached = np.cumsum(weight)
    if reached[-1] == 0:
        return {}
    places = {share: int(np.searchsorted(reached, share * reached[-1])) for share in shares}
    return {share: float(np.exp(summed[place] / weight[place])) for share, place in places.items()}
