"""Atomic file writes: a temporary file, fsync, then os.replace.

After a crash a file has its old contents or its new ones, never a part.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tunesmith.errors import InputError, RunError


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically; it is on the disk when this returns.

    Raises:
        RunError: the file can't be written. The old one stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"can't be written: {error.strerror or error}",
            where=str(path),
            hint="free some space" if error.errno == errno.ENOSPC else None,
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("there is no such file", where=str(path)) from None
    except ValueError as error:
        raise InputError(f"is not JSON: {error}", where=str(path)) from None


@contextmanager
def writing_result(folder: Path) -> Iterator[None]:
    """Context in which the result of a finished training is written.

    Raises:
        RunError: it can't be written; the error says that the training itself is saved.
    """
    hint = f"make room or give write permission, then: tunesmith resume {folder}"
    try:
        yield
    except RunError as error:
        message = f"{error.message}; the training is finished and saved"
        raise RunError(message, where=error.where, hint=error.hint or hint) from error
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(
            f"the result can't be written: {reason}; the training is finished and saved",
            where=str(folder),
            hint=hint,
        ) from error


def sync_folder(path: Path) -> None:
    """Write a folder's entries to the disk (fsync); Windows can't do this for folders."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
