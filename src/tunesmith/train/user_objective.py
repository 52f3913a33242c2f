"""A user's own objective: a Python function in a file that the recipe names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from tunesmith.errors import DataError, RecipeError
from tunesmith.objectives import Objective
from tunesmith.objectives.check import find_fault

WHERE = "objective.name"
COPY = "objective.py"
"""Its name in the run folder, and so in the run's own recipe."""


@dataclass(frozen=True, slots=True)
class UserObjective:
    """The function with the file it came from, as it was when it was read."""

    function: Objective
    name: str  # of the function
    contents: bytes

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.contents).hexdigest()

    def keep(self, folder: Path) -> None:
        """Leave a copy in the run folder."""
        (folder / COPY).write_bytes(self.contents)


def is_user_function(name: str) -> bool:
    """True for `path/to/file.py:my_loss`."""
    return ":" in name


def load_objective(name: str, folders: Sequence[Path]) -> UserObjective:
    """The function of `path/to/file.py:my_loss`, tried out; `folders` are looked in first, then the
    current one.

    Raises:
        RecipeError: there is no such file or function, it fails, or it can't be an objective.
    """
    path, _, function_name = name.rpartition(":")
    file = _find(path, folders)
    contents = file.read_bytes()
    found: Any = getattr(_module(file, contents), function_name, None)
    if not callable(found):
        raise RecipeError(
            f"there is no function {function_name}",
            where=f"{file} ({WHERE})",
            hint="def my_loss(chunk): return -chunk.logprob",
        )
    function = cast("Objective", found)
    try:
        fault = find_fault(function)
    except Exception as error:
        raise RecipeError(
            f"{function_name} fails: {type(error).__name__}: {error}",
            where=f"{_line(error, file)} ({WHERE})",
            hint="it gets a chunk with logits [n, V], target, logprob, entropy and log_sum [n]",
        ) from error
    if fault is not None:
        raise RecipeError(
            f"{function_name} {fault}",
            where=f"{file} ({WHERE})",
            hint="it returns the loss of each target by itself: def my_loss(chunk): return "
            "-chunk.logprob",
        )
    return UserObjective(function, function_name, contents)


def check_same(digest: str | None, user_objective: UserObjective | None) -> None:
    """Refuse to go on with a run whose objective's file is no longer what it was.

    Raises:
        DataError: its contents differ.
    """
    if digest is not None and (user_objective is None or user_objective.sha256 != digest):
        raise DataError(
            "the file of the objective is not what this run was started with",
            where=WHERE,
            hint=f"put it back (the run keeps a copy, {COPY}), or start a new run",
        )


def _find(path: str, folders: Sequence[Path]) -> Path:
    asked = Path(path).expanduser()
    for file in [*(folder / asked for folder in folders), asked]:
        if file.is_file():
            return file.resolve()
    raise RecipeError("there is no such file", where=f"{path} ({WHERE})")


def _module(file: Path, contents: bytes) -> ModuleType:
    """The module of these bytes, and no others: an import would take bytecode of `__pycache__`
    that fits the file by its time and size alone.
    """
    module = ModuleType("tunesmith_user_objective")
    module.__file__ = str(file)
    try:
        exec(compile(contents, str(file), "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        raise RecipeError(
            f"can't be run: {type(error).__name__}: {error}",
            where=f"{_line(error, file)} ({WHERE})",
        ) from error
    return module


def _line(error: Exception, file: Path) -> str:
    """file:line of the deepest frame inside the file."""
    if isinstance(error, SyntaxError):
        return f"{file}:{error.lineno}"
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    return str(file) if line is None else f"{file}:{line}"
