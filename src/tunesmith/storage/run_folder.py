"""The run folder: who may write in it, and what is refused or resumed."""

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
BEGINNING = frozenset({"ledger.json", "machine.json", "objective.py"})
"""Files that stand before recipe.yaml does; a folder with nothing else was killed at its start."""


class RunFolder:
    """A run's folder, held by this process alone until it is closed. A context manager."""

    def __init__(self, path: Path, *, resumed: bool, lock: FolderLock | None) -> None:
        self.path = path
        self.resumed = resumed
        self.notes = lock.notes if lock else ()  # for the start-up lines
        self._lock = lock

    def clear(self, needed: Iterable[Path] = ()) -> None:
        """Delete what an overwritten run left; to be called once nothing can be wrong any more.

        Raises:
            InputError: one of the `needed` files or folders lies in the folder.
            RunError: something can't be deleted; the folder then still counts as a run.
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
        """Let other processes write in the folder. May be called twice."""
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
    """Make the folder of a run, or take an existing one, and lock it.

    Args:
        out: the folder; None makes a new one under `runs` named by UTC time and model.
        model_name: hub id or path the new name ends in.
        resume: an existing run is gone on with (`resumed` is then True); an empty folder starts,
            and one where a start was cut short.
        overwrite: an existing run is taken, for `RunFolder.clear` to delete.

    Raises:
        InputError: the folder has contents and neither flag allows that, is not a run, is not a
            folder, can't be written in, or another process trains in it.
    """
    path = _new_name(model_name) if out is None else Path(out)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(path)
    except OSError as error:
        what = "can't be written in" if path.is_dir() else "can't be made"
        raise InputError(
            f"the folder of the run {what}: {error.strerror or error}",
            where=str(path),
            hint="give another folder with --out, or make this one writable",
        ) from error
    try:
        resumed = _admit(path, resume=resume, overwrite=overwrite)
    except BaseException:
        lock.release()
        raise
    return RunFolder(path, resumed=resumed, lock=lock)


def launched_run(launch: str | None) -> Path | None:
    """The newest run under `runs` that this launch of torchrun began; None if it has begun none."""
    found = [path for path in Path("runs").glob("*") if is_run(path)]
    own = [path for path in found if read_json(path / MARKERS[1]).get("launch", "") == launch]
    return max(own, key=lambda path: path.name, default=None)


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


def _admit(path: Path, *, resume: bool, overwrite: bool) -> bool:
    contents = [entry for entry in path.iterdir() if entry.name != LOCK]
    if not contents:
        return False
    if not resume and not overwrite:
        hint = "give another folder"
        if is_run(path):
            hint = "--resume goes on with this run, --overwrite deletes it and starts anew"
        raise InputError("the folder is not empty", where=str(path), hint=hint)
    if not is_run(path):
        if resume and all(_of_a_beginning(entry) for entry in contents):
            return False
        raise InputError(
            f"the folder is not empty and not a run ({' and '.join(MARKERS)} mark one)",
            where=str(path),
            hint="give another folder, or empty this one by hand",
        )
    return resume


def _of_a_beginning(entry: Path) -> bool:
    known = entry.name.removeprefix(".").removesuffix(".tmp")
    begun = known in BEGINNING or (known == "recipe.yaml" and entry.name != known)
    return begun and entry.is_file()


def _empty(contents: list[Path]) -> None:
    # The markers go last: a deletion cut short leaves a folder that is still known as a run.
    for entry in sorted(contents, key=lambda entry: entry.name in MARKERS):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def run_files(folder: Path) -> dict[str, Path]:
    """Paths of what a run leaves behind, by what they are."""
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
