"""Experiment trackers behind the sink of records: wandb, tensorboard, trackio, mlflow.

Each is imported only when asked for. A tracker that fails, at its start or later, is named in one
warning and left alone from then on: a run never stops for it.
"""

from __future__ import annotations

import importlib
import json
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError
from tunesmith.metrics.records import Sink
from tunesmith.redact import redact

_LOG = logging.getLogger(__name__)
_IDS = "trackers.json"


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told about a run."""

    folder: Path
    project: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    resumed: bool = False

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.resolve().name


class TensorboardSink:
    """Scalars as TensorBoard event files in `RUN/tensorboard`."""

    def __init__(self, module: Any, run: TrackedRun) -> None:
        self._writer = module.SummaryWriter(str(run.folder / "tensorboard"))
        if run.settings:
            self._writer.add_text(
                "recipe", f"```json\n{json.dumps(run.settings, indent=2)}\n```", 0
            )

    def write(self, record: Mapping[str, Any]) -> None:
        """Add the record's numbers at its step."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.get("step", 0))

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; a resumed run goes on under its id."""

    def __init__(self, module: Any, run: TrackedRun) -> None:
        self._run = module.init(
            project=run.project,
            name=run.name,
            id=_kept_id(run, "wandb"),
            dir=str(run.folder),
            config=dict(run.settings),
            resume="allow",
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record's numbers at its step."""
        self._run.log(scalars(record), step=record.get("step", 0))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TrackioSink:
    """A trackio run; a resumed run goes on under its name."""

    def __init__(self, module: Any, run: TrackedRun) -> None:
        self._module = module
        module.init(
            project=run.project,
            name=run.name,
            config=dict(run.settings),
            resume="allow" if run.resumed else "never",
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record's numbers at its step."""
        self._module.log(scalars(record), step=record.get("step", 0))

    def close(self) -> None:
        """Finish the run."""
        self._module.finish()


class MlflowSink:
    """A run of the MLflow experiment named as the project; a resumed run goes on under its id."""

    def __init__(self, module: Any, run: TrackedRun) -> None:
        self._module = module
        module.set_experiment(run.project)
        known = _read_ids(run.folder).get("mlflow") if run.resumed else None
        started = module.start_run(run_id=known) if known else module.start_run(run_name=run.name)
        _write_id(run.folder, "mlflow", started.info.run_id)
        if run.settings and not known:
            module.log_dict(dict(run.settings), "recipe.json")

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the record's numbers at its step."""
        self._module.log_metrics(scalars(record), step=record.get("step", 0))

    def close(self) -> None:
        """End the run."""
        self._module.end_run()


TRACKERS: dict[str, tuple[str, Callable[[Any, TrackedRun], Sink]]] = {
    "wandb": ("wandb", WandbSink),
    "tensorboard": ("torch.utils.tensorboard", TensorboardSink),
    "trackio": ("trackio", TrackioSink),
    "mlflow": ("mlflow", MlflowSink),
}
"""Name in the recipe: the module it needs and the sink that feeds it."""


class GuardedSink:
    """A sink whose first failure is logged as a warning and that is silent from then on."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        self._sink = self._attempt(make)

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand one record on, if the tracker still works."""
        if self._sink is not None:
            sink = self._sink
            self._attempt(lambda: sink.write(record))

    def close(self) -> None:
        """Close the tracker, if it still works."""
        if self._sink is not None:
            self._attempt(self._sink.close)
            self._sink = None

    def _attempt(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a tracker does wrong, training goes on
            self._sink = None
            _LOG.warning(
                "%s failed and gets no more records (%s: %s); metrics.jsonl has them all",
                self._name,
                type(error).__name__,
                redact(str(error)),
            )
            return None


def open_tracker(name: str, run: TrackedRun) -> Sink:
    """The sink of a tracker named in `TRACKERS`.

    Raises:
        InputError: its package is not installed.
    """
    module_name, make = TRACKERS[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{name} is not installed ({error})",
            where="log.to",
            hint="pip install 'tunesmith[logging]', or leave it out of log.to",
        ) from None
    return GuardedSink(name, lambda: make(module, run))


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record as trackers name them: `train/loss`, `eval/SET/nll`.

    Records of kind event and of samples have none that are worth a curve.
    """
    kind = record.get("kind")
    if kind not in ("train", "eval"):
        return {}
    prefix = f"eval/{record['set']}" if kind == "eval" and "set" in record else str(kind)
    return {
        f"{prefix}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def _kept_id(run: TrackedRun, tracker: str) -> str:
    known = _read_ids(run.folder).get(tracker) if run.resumed else None
    if known is None:
        known = uuid.uuid4().hex[:12]
        _write_id(run.folder, tracker, known)
    return known


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        return json.loads((folder / _IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_id(folder: Path, tracker: str, value: str) -> None:
    ids = {**_read_ids(folder), tracker: value}
    (folder / _IDS).write_text(json.dumps(ids) + "\n", encoding="utf-8")
