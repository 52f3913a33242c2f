"""Experiment trackers: Weights & Biases, TensorBoard, trackio and MLflow.

A tracker's package is imported only if the recipe names it. If a tracker fails, at its start or
later, there is one warning and it gets no more records. The run continues.
"""

from __future__ import annotations

import importlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
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
    """The run as a tracker sees it: folder, project, settings."""

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
    """A Weights & Biases run. A resumed run continues the same one, by its id."""

    def __init__(self, module: Any, run: TrackedRun) -> None:
        self._run = module.init(
            project=run.project,
            name=run.name,
            id=_run_id(run, "wandb"),
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
    """A trackio run. A resumed run continues the same one, by its name."""

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
    """A run in the MLflow experiment of the project. A resumed run continues it, by its id."""

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
"""Name in the recipe: the module that it needs, and its sink."""


class GuardedSink:
    """A sink that logs its first failure as a warning and ignores records after it."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        self._sink = self._attempt(make)

    def write(self, record: Mapping[str, Any]) -> None:
        """Pass one record to the tracker, if it still works."""
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
        except Exception as error:  # a failing tracker must not stop the training
            self._sink = None
            _LOG.warning(
                "%s failed and gets no more records (%s: %s); metrics.jsonl has all records",
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
    _, make = TRACKERS[name]
    module = _package(name)
    return GuardedSink(name, lambda: make(module, run))


def check_trackers(names: Iterable[str]) -> None:
    """Import the packages of these trackers, before anything is written.

    Raises:
        InputError: one is not installed.
    """
    for name in names:
        _package(name)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(TRACKERS[name][0])
    except ImportError as error:
        raise InputError(
            f"{name} is not installed ({error})",
            where="log.to",
            hint="pip install 'tunesmith[logging]', or leave it out of log.to",
        ) from None


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by the names that trackers show: `train/loss`, `eval/SET/nll`.

    Empty for records of other kinds, such as events and samples.
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


def _run_id(run: TrackedRun, tracker: str) -> str:
    """The id of the run in the tracker: the saved one on resume, else a new one, which is saved."""
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
