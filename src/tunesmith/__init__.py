"""Supervised fine-tuning (SFT) of language models, with checks against silent errors."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tunesmith.errors import InputError, InterruptedRun, RunError, TunesmithError
from tunesmith.version import __version__ as __version__

if TYPE_CHECKING:
    from tunesmith.config.read import read_recipe
    from tunesmith.config.schema import Recipe
    from tunesmith.run import Run, resume, train

__all__ = [
    "InputError",
    "InterruptedRun",
    "Recipe",
    "Run",
    "RunError",
    "TunesmithError",
    "read_recipe",
    "resume",
    "train",
]

_LATER = {
    "Recipe": "tunesmith.config.schema",
    "Run": "tunesmith.run",
    "read_recipe": "tunesmith.config.read",
    "resume": "tunesmith.run",
    "train": "tunesmith.run",
}
"""Names that are imported on first use, so that `import tunesmith` is fast."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])


class _Package(ModuleType):
    """The class of this package, in which `tunesmith.train` stays the function.

    Importing a module of the subpackage `tunesmith.train` would bind the name to the subpackage.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
