"""Checkpoint folders that are whole or not there: fsync, rename, and a manifest with SHA-256
digests.

A checkpoint is `RUN/checkpoints/step-N/`: tensors as safetensors, everything else as JSON, and a
manifest with size and SHA-256 of each file. It is written under another name, brought to the disk,
and renamed; so no moment of a crash leaves a folder named `step-N` that is not complete.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tunesmith.checkpoint.rng import RngState
from tunesmith.checkpoint.state_schema import state_fault
from tunesmith.checkpoint.tensor_io import encoded, file_digest, write_synced
from tunesmith.errors import CheckpointError, first_line
from tunesmith.storage.atomic import sync_folder

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PARTS = "parts"
"""Folder of an optimizer that several ranks wrote together, each a part."""
TENSOR_FILES = ("model", "optimizer", "rng")
ASIDE = ".tmp"
REPLACED = ".replaced"
COMPARED = (
    "versions", "world_size", "context_parallel", "tensor_parallel", "threads", "device", "kernels",
    "compile", "deterministic",
)  # fmt: skip
"""Entries of `TrainState.meta` on which bitwise resume depends."""
RENAMED = {"context": "context_parallel", "tensor": "tensor_parallel"}
"""Entries of `TrainState.meta` that checkpoints of older versions hold under another name."""

_STEP = re.compile(r"step-(\d+)$")


@dataclass(frozen=True, slots=True)
class TrainState:
    """All that the rest of a run depends on, after `step` optimizer steps."""

    step: int
    model: Mapping[str, Tensor]  # what the optimizer's masters don't give: frozen, buffers, ...
    optimizer: Mapping[str, Tensor]  # float32 masters of the trained parameters, moments, counter
    rng: RngState
    meta: Mapping[str, Any]  # JSON: recipe hash, versions, world size, threads, best eval, ...
    finish_parts: Callable[[], None] | None = None  # once all ranks have written theirs


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files agree with its manifest, and what was wrong with newer ones."""

    path: Path
    step: int
    warnings: tuple[str, ...] = ()


def save_checkpoint(
    run: Path, state: TrainState, *, keep: int, best: int | None = None, good: int | None = None
) -> Path:
    """Write `state` to `run/checkpoints/step-N`, then delete what is no longer to be kept.

    Kept are the newest `keep` checkpoints and the one of step `best`. Checkpoints of later steps
    belong to a future that was given up, and go. What there is beyond `keep` goes first, to make
    room; else nothing is deleted before the new one is on the disk, and that of step `good`, which
    is known to be whole, not at all.

    Raises:
        CheckpointError: it can't be written; the earlier ones are as they were.
    """
    begin_checkpoint(run, state.step, keep=keep, protected={best, good})
    return complete_checkpoint(run, state, keep=keep, best=best)


def begin_checkpoint(run: Path, step: int, *, keep: int, protected: Collection[int | None]) -> Path:
    """Make room, and the folder that is to become `run/checkpoints/step-N`.

    Raises:
        CheckpointError: it can't be made.
    """
    parent = run / "checkpoints"
    aside = parent / f"step-{step}{ASIDE}"
    with writing_told(run, step):
        parent.mkdir(parents=True, exist_ok=True)
        clean_checkpoints(run)
        _prune(parent, step, keep=keep, protected=protected, later=False)
        aside.mkdir()
    return aside


def complete_checkpoint(
    run: Path,
    state: TrainState,
    *,
    keep: int,
    best: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> Path:
    """Write `state` into the folder that `begin_checkpoint` made, and give it its name.

    `between` is called now and then, and may raise to leave the folder as it is.

    Raises:
        CheckpointError: it can't be written; the earlier ones are as they were.
    """
    parent = run / "checkpoints"
    final = parent / f"step-{state.step}"
    aside = parent / f"{final.name}{ASIDE}"
    with writing_told(run, state.step):
        _write_files(aside, state, between)
        sync_folder(aside)
        if final.exists():
            os.rename(final, parent / f"{final.name}{REPLACED}")
        os.rename(aside, final)
        sync_folder(parent)
    clean_checkpoints(run)
    _prune(parent, state.step, keep=keep, protected={best}, later=True)
    return final


def prune_checkpoints(run: Path, step: int, *, keep: int, best: int | None) -> None:
    """Delete what a run that was killed had not yet deleted: of the checkpoints up to `step`, which
    is known to be whole, all but the newest `keep` and the best.
    """
    with suppress(OSError):  # a folder that can't be written is told by the next save
        _prune(run / "checkpoints", step, keep=keep, protected={best, step}, later=False)


@contextmanager
def writing_told(run: Path, step: int, *, first: bool = True) -> Iterator[None]:
    """An error of the system inside becomes one that says which checkpoint can't be written.

    `first`: what was begun of it is removed.

    Raises:
        CheckpointError: in place of an OSError.
    """
    final = run / "checkpoints" / f"step-{step}"
    try:
        yield
    except OSError as error:
        if first:
            shutil.rmtree(final.with_name(f"{final.name}{ASIDE}"), ignore_errors=True)
        raise _write_error(run, final, error) from error


def parts_folder(run: Path, step: int) -> Path:
    """Where the ranks write their parts before the first one completes the checkpoint."""
    return run / "checkpoints" / f"step-{step}{ASIDE}" / PARTS


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest undamaged checkpoint of a run; damaged newer ones are named in its warnings.

    Raises:
        CheckpointError: there is none, or all are damaged.
    """
    warnings: list[str] = []
    for step, path in _checkpoints(run / "checkpoints"):
        damage = find_damage(path)
        if damage is None:
            return Checkpoint(path, step, tuple(warnings))
        warnings.append(f"checkpoint {path} is damaged and passed over: {damage}")
    if not warnings:
        raise CheckpointError(
            "the run has no checkpoint to go on from",
            where=str(run),
            hint="start it again with --overwrite",
        )
    raise CheckpointError(
        "every checkpoint of the run is damaged\n" + "\n".join(warnings),
        where=str(run),
        hint="start it again with --overwrite",
    )


def load_checkpoint(path: Path) -> TrainState:
    """The state in a checkpoint folder; tensors are on the CPU.

    Raises:
        CheckpointError: a file is missing or can't be read.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = {name: load_file(path / f"{name}.safetensors") for name in TENSOR_FILES}
        rng = RngState(tensors["rng"], state["rng"]["numpy"], state["rng"]["python"])
        meta = {str(RENAMED.get(key, key)): value for key, value in state["meta"].items()}
        return TrainState(state["step"], tensors["model"], tensors["optimizer"], rng, meta)
    except Exception as error:
        raise CheckpointError(f"can't be read: {error}", where=str(path)) from error


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words that name the file; None if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (e["bytes"], e["sha256"]) for name, e in manifest["files"].items()}
        number = manifest["format"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} can't be read"
    if number != FORMAT:
        return f"{MANIFEST} is of format {number}, this version reads {FORMAT}"
    for name in (STATE, *(f"{name}.safetensors" for name in TENSOR_FILES)):
        if name not in files:
            return f"{MANIFEST} doesn't list {name}"
    found = (_file_damage(path / name, size, digest) for name, (size, digest) in files.items())
    return next((damage for damage in found if damage), None) or _damage_of_state(path)


def _damage_of_state(path: Path) -> str | None:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{STATE}: {first_line(error)}"
    step = _STEP.match(path.name)
    fault = state_fault(state, step=int(step[1]) if step else state.get("step"))
    return None if fault is None else f"{STATE}: {fault}"


def _file_damage(path: Path, size: int, digest: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes instead of {size}"
        if file_digest(path) != digest:
            return f"{path.name} has other contents than were written (SHA-256 differs)"
    except OSError as error:
        return f"{path.name}: {error.strerror or error}"
    return None


def clean_checkpoints(run: Path) -> None:
    """Remove what a crash left half-written. Only for the process that holds the run's folder."""
    parent = run / "checkpoints"
    if not parent.is_dir():
        return
    for entry in parent.iterdir():
        if entry.name.endswith(REPLACED):
            final = parent / entry.name[: -len(REPLACED)]
            if final.exists():
                shutil.rmtree(entry)
            else:  # the crash came between the two renames
                os.rename(entry, final)
        elif entry.name.endswith(ASIDE):
            shutil.rmtree(entry, ignore_errors=True)


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each thing that bitwise resume depends on and that has changed.

    Both are `TrainState.meta`; the entries named in `COMPARED` are compared, mappings key by key.
    """
    lines: list[str] = []
    for entry in COMPARED:
        for name, before, now in _pairs(entry, saved.get(entry), current.get(entry)):
            if before != now:
                lines.append(f"{name} was {before}, is {now}")
    return lines


def _pairs(entry: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        yield entry.replace("_", " "), before, now
        return
    for name in sorted({*before, *now}):
        yield name, before.get(name, "absent"), now.get(name, "absent")


def _write_files(folder: Path, state: TrainState, between: Callable[[], None]) -> None:
    tensors = (state.model, state.optimizer, state.rng.tensors)
    files: dict[str, dict[str, Any]] = {}
    for name, group in zip(TENSOR_FILES, tensors, strict=True):
        path = folder / f"{name}.safetensors"
        files[path.name] = write_synced(path, encoded(group), between)
    if state.finish_parts is not None:
        state.finish_parts()
        for file in sorted((folder / PARTS).iterdir()):
            files[f"{PARTS}/{file.name}"] = {
                "bytes": file.stat().st_size,
                "sha256": file_digest(file),
            }
        sync_folder(folder / PARTS)
    rest = {
        "step": state.step,
        "meta": dict(state.meta),
        "rng": {"numpy": state.rng.numpy, "python": state.rng.python},
    }
    files[STATE] = write_synced(folder / STATE, [json.dumps(rest).encode()], between)
    manifest = {"format": FORMAT, "step": state.step, "files": files}
    write_synced(folder / MANIFEST, [json.dumps(manifest, indent=2).encode()], between)


def _checkpoints(parent: Path) -> list[tuple[int, Path]]:
    """Steps and folders, newest first."""
    entries = parent.iterdir() if parent.is_dir() else ()
    found = [(match, entry) for entry in entries if (match := _STEP.match(entry.name))]
    return sorted(((int(match[1]), entry) for match, entry in found), reverse=True)


def _prune(
    parent: Path, step: int, *, keep: int, protected: Collection[int | None], later: bool
) -> None:
    """Delete all but the newest `keep` up to `step` and the spared; of later steps only if so
    asked.
    """
    checkpoints = _checkpoints(parent)
    newest = [number for number, _ in checkpoints if number <= step][: max(1, keep)]
    for number, path in checkpoints:
        if number not in newest and number not in protected and (later or number <= step):
            # Renamed first, so that a crash can't leave a half-deleted folder under its name.
            doomed = path.with_name(f"{path.name}{ASIDE}")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _write_error(run: Path, final: Path, error: OSError) -> CheckpointError:
    earlier = [path.name for _, path in _checkpoints(run / "checkpoints")]
    intact = f"; {earlier[0]} is intact" if earlier else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = f"see that {run} can be written, then run `tunesmith resume {run}`"
    if full:
        hint = f"free some space or lower checkpoint.keep, then run `tunesmith resume {run}`"
    reason = "the disk is full" if full else (error.strerror or str(error))
    return CheckpointError(
        f"the checkpoint can't be written: {reason}{intact}", where=str(final), hint=hint
    )
