"""Checkpoints that are whole or not there.

A checkpoint is `RUN/checkpoints/step-N/`: tensors as safetensors, everything else as JSON, and a
manifest with size and SHA-256 of each file. It is written under another name, brought to the disk,
and renamed; so no moment of a crash leaves a folder named `step-N` that is not complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.errors import CheckpointError
from tunesmith.train.folder import sync_folder
from tunesmith.train.rng import RngState

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PARTS = "parts"
"""Folder of an optimizer that several ranks wrote together, each a part."""
TENSOR_FILES = ("model", "optimizer", "rng")
ASIDE = ".tmp"
REPLACED = ".replaced"
COMPARED = ("versions", "world_size", "threads", "device", "deterministic")
"""Entries of `TrainState.meta` on which bitwise resume depends."""

_STEP = re.compile(r"step-(\d+)$")
_BLOCK = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True)
class TrainState:
    """All that the rest of a run depends on, after `step` optimizer steps."""

    step: int
    model: Mapping[str, Tensor]  # what the optimizer's masters don't give: frozen, buffers, ...
    optimizer: Mapping[str, Tensor]  # float32 masters of the trained parameters, moments, counter
    rng: RngState
    meta: Mapping[str, Any]  # JSON: recipe hash, versions, world size, threads, best eval, ...
    parts: Callable[[Path], None] | None = None  # writes the optimizer into a folder with others


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
    parent = run / "checkpoints"
    final = parent / f"step-{state.step}"
    aside = parent / f"{final.name}{ASIDE}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        clean_checkpoints(run)
        _prune(parent, state.step, keep=keep, spared={best, good}, later=False)
        aside.mkdir()
        _write_files(aside, state)
        sync_folder(aside)
        if final.exists():
            os.rename(final, parent / f"{final.name}{REPLACED}")
        os.rename(aside, final)
        sync_folder(parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _write_error(run, final, error) from error
    clean_checkpoints(run)
    _prune(parent, state.step, keep=keep, spared={best}, later=True)
    return final


def parts_folder(run: Path, step: int) -> Path:
    """Where the other ranks write their parts while the first one saves the checkpoint."""
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
        return TrainState(state["step"], tensors["model"], tensors["optimizer"], rng, state["meta"])
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
    return next((damage for damage in found if damage), None)


def _file_damage(path: Path, size: int, digest: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes instead of {size}"
        if _file_digest(path) != digest:
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


def _write_files(folder: Path, state: TrainState) -> None:
    tensors = (state.model, state.optimizer, state.rng.tensors)
    files: dict[str, dict[str, Any]] = {}
    for name, group in zip(TENSOR_FILES, tensors, strict=True):
        files[f"{name}.safetensors"] = _write(folder / f"{name}.safetensors", _encoded(group))
    if state.parts is not None:
        state.parts(folder / PARTS)
        for file in sorted((folder / PARTS).iterdir()):
            files[f"{PARTS}/{file.name}"] = {
                "bytes": file.stat().st_size,
                "sha256": _file_digest(file),
            }
        sync_folder(folder / PARTS)
    rest = {
        "step": state.step,
        "meta": dict(state.meta),
        "rng": {"numpy": state.rng.numpy, "python": state.rng.python},
    }
    files[STATE] = _write(folder / STATE, [json.dumps(rest).encode()])
    manifest = {"format": FORMAT, "step": state.step, "files": files}
    _write(folder / MANIFEST, [json.dumps(manifest, indent=2).encode()])


def _encoded(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: one tensor at a time is brought to the CPU, none is copied."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel() == 0:  # its elements can't be seen as bytes
            continue
        flat = tensor.detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data


def _write(path: Path, pieces: Any) -> dict[str, Any]:
    """Write and bring to the disk; size and digest are of what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            for start in range(0, len(piece), _BLOCK):
                block = piece[start : start + _BLOCK]
                digest.update(block)
                file.write(block)
                size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _checkpoints(parent: Path) -> list[tuple[int, Path]]:
    """Steps and folders, newest first."""
    entries = parent.iterdir() if parent.is_dir() else ()
    found = [(match, entry) for entry in entries if (match := _STEP.match(entry.name))]
    return sorted(((int(match[1]), entry) for match, entry in found), reverse=True)


def _prune(
    parent: Path, step: int, *, keep: int, spared: Collection[int | None], later: bool
) -> None:
    """Delete all but the newest `keep` up to `step` and the spared; of later steps only if so
    asked.
    """
    checkpoints = _checkpoints(parent)
    newest = [number for number, _ in checkpoints if number <= step][: max(1, keep)]
    for number, path in checkpoints:
        if number not in newest and number not in spared and (later or number <= step):
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
