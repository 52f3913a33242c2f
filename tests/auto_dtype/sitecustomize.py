"""An import hook (`sys.meta_path`, PEP 302) that decides what `model.dtype: auto` becomes on a CPU.

`TUNESMITH_TEST_DTYPE=bfloat16` or `float32` lets `cpu_bfloat16` answer as a CPU with or without
bfloat16 in hardware does. `conftest.py` puts this folder on PYTHONPATH, and Python imports a module
of this name at its start, so every process that a test starts gives the same answer. The product
itself reads no such variable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

VARIABLE = "TUNESMITH_TEST_DTYPE"
ANSWERS = {"bfloat16": "forced by the tests", "float32": None}
MODULE = "tunesmith.model.ops.dtype"


class _Forced(MetaPathFinder):
    """Finds the module as Python does, and replaces the function as soon as it was executed."""

    def __init__(self, answer: str | None) -> None:
        self._answer = answer

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            vars(module)["cpu_bfloat16"] = lambda: self._answer

        spec.loader.exec_module = exec_module
        return spec


def force() -> None:
    """Install the hook in this process, if the variable is set; a second call does nothing."""
    dtype = os.environ.get(VARIABLE)
    if not dtype or any(isinstance(finder, _Forced) for finder in sys.meta_path):
        return
    if dtype not in ANSWERS:
        raise SystemExit(f"{VARIABLE}={dtype}: bfloat16 or float32")
    sys.meta_path.insert(0, _Forced(ANSWERS[dtype]))


force()
