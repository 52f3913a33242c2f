"""The guard against non-finite steps (stop, or skip the step) and loss spikes: steps whose loss or
gradient norm exceeds a multiple of the running median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tunesmith.distributed.world import World
from tunesmith.errors import NonFiniteError, RunError
from tunesmith.train.anomaly.incident import Decode, number_or_text, ranked, save_incident
from tunesmith.train.step import StepResult
from tunesmith.types import Document

SINGLE_WORLD = World()
PATIENCE = 10
"""Steps in a row that may be skipped; then it is no longer the rows that are wrong."""
NAMED = 3
"""Rows that a message names."""


class Guard:
    """Judges the numbers of each step, keeps what is needed to look into it, and stops the run
    where the recipe says so.

    Args:
        folder: of the run.
        decode: ids to text.
        non_finite: whether a step that isn't finite stops the run or is left out.
        limits: multiples of the running median for "loss" and "grad_norm", None for never.
        stops: whether a step that stands out stops the run.
        patience: steps in a row that may be skipped, None for any number.
        ranks: of which the first writes to the run's folder for all. They decide by the same
            numbers, and so alike.
    """

    def __init__(
        self,
        folder: Path,
        decode: Decode,
        *,
        non_finite: Literal["stop", "skip"] = "stop",
        limits: Mapping[str, float | None],
        stops: bool = False,
        patience: int | None = PATIENCE,
        world: World = SINGLE_WORLD,
    ) -> None:
        self.folder = folder
        self.last: StepResult | None = None  # of the newest step, taken or not
        self._decode = decode
        self._non_finite = non_finite
        self._spikes = Spikes(limits)
        self._stops = stops
        self._patience = patience
        self._world = world
        self._skipped = 0  # in a row

    def not_finite(
        self, step: int, documents: Sequence[Document], result: StepResult
    ) -> dict[str, Any]:
        """The record of a step, from 1, that was not taken.

        Raises:
            NonFiniteError: the run is to stop.
        """
        self.last = result
        record = {
            "kind": "event",
            "event": "skipped",
            "step": step,
            "loss": number_or_text(result.loss),
            "grad_norm": number_or_text(result.grad_norm),
            **self._kept(step, documents, result),
        }
        what = f"the loss is {result.loss:g} and the gradient norm {result.grad_norm:g}"
        rows = _named(documents, result)
        if self._non_finite == "stop":
            self._stop(f"{what}, at step {step}; {rows}", "or train.non_finite=skip in a new run")
        self._skipped += 1
        if self._patience is not None and self._skipped >= self._patience:
            self._stop(
                f"{what}, at step {step}, as in {self._skipped} steps in a row; {rows}",
                "and look at the rows in its incident folders",
            )
        record["message"] = f"step {step} is skipped: {what}; {rows}"
        return record

    def look(
        self, step: int, documents: Sequence[Document], result: StepResult
    ) -> dict[str, Any] | None:
        """The record of a step, from 1, that stands out; None for any other."""
        self.last, self._skipped = result, 0
        found = self._spikes.see({"loss": result.loss, "grad_norm": result.grad_norm})
        if not found:
            return None
        said = {
            "spikes": [
                {"what": spike.what, "value": spike.value, "median": spike.median}
                for spike in found
            ]
        }
        message = f"step {step}: {_words(found)}; {_named(documents, result)}"
        return {
            "kind": "event",
            "event": "spike",
            "step": step,
            **said,
            **self._kept(step, documents, result, said),
            "message": message,
        }

    def obey(self, record: Mapping[str, Any]) -> None:
        """Stop the run at a spike if the recipe says so; to be called once it is in the records.

        Raises:
            RunError: it does.
        """
        if self._stops:
            raise RunError(
                f"{record['message']}; nothing was saved since the last checkpoint",
                where=str(self.folder),
                hint=f"look at {record['incident'] or 'the rows'}; `tunesmith resume {self.folder} "
                "log.on_spike=report` goes on from the last checkpoint all the same",
            )

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {**self._spikes.tensors(), "guard.skipped": torch.tensor([self._skipped])}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds."""
        self._spikes.restore(tensors)
        if "guard.skipped" in tensors:  # older checkpoints have none
            self._skipped = int(tensors["guard.skipped"][0])

    def _kept(
        self,
        step: int,
        documents: Sequence[Document],
        result: StepResult,
        said: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        place = save_incident(
            self.folder, step, documents=documents, result=result, decode=self._decode, said=said,
            world=self._world,
        )  # fmt: skip
        worst = [entry["row"] for _, _, entry in ranked(documents, result)[:NAMED]]
        return {"rows": worst, "incident": None if place is None else place.name}

    def _stop(self, what: str, more: str) -> None:
        raise NonFiniteError(
            what,
            where=str(self.folder),
            hint=f"a lower optim.lr, or model.dtype=float32, {more}; "
            f"`tunesmith resume {self.folder}` goes on from the last checkpoint",
        )


def _words(spikes: Sequence[Spike]) -> str:
    names = {"loss": "the loss", "grad_norm": "the gradient norm"}
    return " and ".join(
        f"{names[spike.what]} is {spike.value:.4g}, {spike.factor:.3g} times its median"
        for spike in spikes
    )


def _named(documents: Sequence[Document], result: StepResult) -> str:
    """The rows that stand out in the step."""
    shown = [
        f"{entry['row']} (loss {float(entry['loss']):.4g})"
        for _, _, entry in ranked(documents, result)[:NAMED]
    ]
    rest = len(documents) - len(shown)
    return f"its worst rows: {', '.join(shown)}" + (f" and {rest} more" if rest else "")


WINDOW = 100
"""Steps of which the median is taken, at most."""
LEAST = 20
"""Steps that must have been seen before one can stand out."""


@dataclass(frozen=True, slots=True)
class Spike:
    """A number of a step that is more than its allowed multiple of the median before it."""

    what: str  # "loss" or "grad_norm"
    value: float
    median: float

    @property
    def factor(self) -> float:
        """How many times the median it is; infinite over a median of 0."""
        return self.value / self.median if self.median else float("inf")


class Spikes:
    """Compares each step with the running medians of the steps before it.

    `limits` has for "loss" and "grad_norm" the multiple of the median from which on a step stands
    out, None for never. A step that stands out counts in the medians to come like any other: a new
    level is reported until it is the usual one.
    """

    def __init__(self, limits: Mapping[str, float | None]) -> None:
        self._limits = dict(limits)
        self._seen: dict[str, list[float]] = {name: [] for name in limits}

    def see(self, values: Mapping[str, float]) -> list[Spike]:
        """Take a step's numbers; returns those that stand out."""
        found: list[Spike] = []
        for name, limit in self._limits.items():
            seen = self._seen[name]
            if limit is not None and len(seen) >= LEAST:
                spike = Spike(name, values[name], float(np.median(seen)))
                if spike.value > limit * spike.median:
                    found.append(spike)
            seen.append(values[name])
            del seen[:-WINDOW]
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What was seen, for a checkpoint."""
        return {
            f"spikes.{name}": torch.tensor(seen, dtype=torch.float64)
            for name, seen in self._seen.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds."""
        for name in self._seen:
            if f"spikes.{name}" in tensors:  # older checkpoints have none
                self._seen[name] = tensors[f"spikes.{name}"].tolist()
