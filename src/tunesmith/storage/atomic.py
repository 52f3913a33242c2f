"""Atomic file writes by a temporary file, fsync and os.replace: a file is whole or not there."""

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
    """Replace a file in one go: after a crash it has its old or its new contents, on the disk.

    Raises:
        RunError: the file can't be written; the old one stays.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunError(
            f"can't be written: {error.strerror or error}",
            where=str(path),
            hint="free some space" if error.errno == errno.ENOSPC else None,
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one go, as `write_text` does."""
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
    """Inside, the result of a finished training is written.

    Raises:
        RunError: it can't be, in place of what the system says.
    """
    hint = f"`tunesmith resume {folder}` writes it once it can be written"
    try:
        yield
    except RunError as error:
        message = f"{error.message}; the training is done and saved"
        raise RunError(message, where=error.where, hint=error.hint or hint) from error
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RunError(
            f"the result can't be written: {reason}; the training is done and saved",
            where=str(folder),
            hint=hint,
        ) from error


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
