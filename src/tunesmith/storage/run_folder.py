"""Run folder: its files, its lock, and whether a run is started, resumed or overwritten in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from tunesmith.errors import InputError, RunError
from tunesmith.storage.atomic import read_json
from tunesmith.storage.lock import LOCK, FolderLock, take_lock

MARKERS = ("recipe.yaml", "machine.json")
"""Files that every run has; a folder with both is a run."""
START_FILES = frozenset({"ledger.json", "machine.json", "objective.py"})
"""Files written before recipe.yaml. A run with no other files was killed while it started."""


class RunFolder:
    """A run folder that this process has locked; a context manager that releases the lock."""

    def __init__(self, path: Path, *, resumed: bool, lock: FolderLock | None) -> None:
        self.path = path
        self.resumed = resumed
        self.notes = lock.notes if lock else ()  # lines to print at the start
        self._lock = lock

    def clear(self, needed: Iterable[Path] = ()) -> None:
        """Delete the files of an overwritten run. Call it after the new job has been built.

        Raises:
            InputError: one of the `needed` files or folders is inside the folder.
            RunError: a file can't be deleted. The folder then still counts as a run.
        """
        inside = self.path.resolve()
        for path in needed:
            if path.resolve().is_relative_to(inside):
                raise InputError(
                    f"--overwrite would delete {path}, which the new run needs",
                    where=str(self.path),
                    hint="give another folder with --out",
                )
        try:
            _empty([entry for entry in self.path.iterdir() if entry.name != LOCK])
        except OSError as error:
            raise RunError(
                f"the run can't be deleted: {error.strerror or error}", where=str(self.path)
            ) from error

    def close(self) -> None:
        """Release the lock. May be called twice."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_run(
    out: Path | None, *, model_name: str, resume: bool = False, overwrite: bool = False
) -> RunFolder:
    """Create or open the folder of a run, and lock it.

    Args:
        out: the folder. None creates a new one under `runs`, named by UTC time and model.
        model_name: hub id or path, from which the new folder gets its name.
        resume: if the folder holds a run, continue it (`resumed` is then True). If it is empty, or
            its run was killed while it started, start a new one.
        overwrite: if the folder holds a run, `RunFolder.clear` will delete it.

    Raises:
        InputError: the folder has contents and neither flag allows that, is not a run, is not a
            folder, can't be written to, or another process trains in it.
    """
    path = _new_name(model_name) if out is None else Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
    except OSError as error:
        what = "can't be written to" if path.is_dir() else "can't be created"
        raise InputError(
            f"the run folder {what}: {error.strerror or error}",
            where=str(path),
            hint="give another folder with --out, or make this one writable",
        ) from error
    try:
        resumed = _check_contents(path, resume=resume, overwrite=overwrite)
    except BaseException:
        lock.release()
        raise
    return RunFolder(path, resumed=resumed, lock=lock)


def launched_run(launch: str | None) -> Path | None:
    """The newest run under `runs` that this launch of torchrun has started, or None."""
    found = [path for path in Path("runs").glob("*") if is_run(path)]
    started = [path for path in found if read_json(path / MARKERS[1]).get("launch", "") == launch]
    return max(started, key=lambda path: path.name, default=None)


def is_run(path: Path) -> bool:
    """True if the folder is a run of Tunesmith."""
    return all((path / name).is_file() for name in MARKERS)


def _new_name(model_name: str) -> Path:
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_name).name).strip("-.") or "model"
    stem = f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}-{base}"
    path, number = Path("runs") / stem, 2
    while path.exists():
        path, number = Path("runs") / f"{stem}-{number}", number + 1
    return path


def _check_contents(path: Path, *, resume: bool, overwrite: bool) -> bool:
    contents = [entry for entry in path.iterdir() if entry.name != LOCK]
    if not contents:
        return False
    if not resume and not overwrite:
        hint = "give another folder with --out"
        if is_run(path):
            hint = "--resume continues this run, --overwrite deletes it and starts a new one"
        raise InputError("the folder is not empty", where=str(path), hint=hint)
    if not is_run(path):
        if resume and all(_is_start_file(entry) for entry in contents):
            return False
        raise InputError(
            f"the folder is not empty, and not a run ({' and '.join(MARKERS)} are missing)",
            where=str(path),
            hint="give another folder with --out, or empty this one",
        )
    return resume


def _is_start_file(entry: Path) -> bool:
    known = entry.name.removeprefix(".").removesuffix(".tmp")
    begun = known in START_FILES or (known == "recipe.yaml" and entry.name != known)
    return begun and entry.is_file()


def _empty(contents: list[Path]) -> None:
    # The markers are deleted last, so that after an interrupted deletion the folder still counts as
    # a run, which --overwrite can delete.
    for entry in sorted(contents, key=lambda entry: entry.name in MARKERS):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def run_files(folder: Path) -> dict[str, Path]:
    """The paths of a run's files and folders, by name."""
    names = {
        "recipe": "recipe.yaml",
        "machine": "machine.json",
        "ledger": "ledger.json",
        "metrics": "metrics.jsonl",
        "rows": "rows.parquet",
        "samples": "samples.jsonl",
        "objective": "objective.py",
        "faults": "faults.jsonl",
        "model": "model",
        "report": "report.html",
        "checkpoints": "checkpoints",
    }
    return {name: folder / file for name, file in names.items()}
