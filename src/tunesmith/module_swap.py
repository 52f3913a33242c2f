"""Monkey-patching of single `torch.nn.Module`s: another `forward` or another class, put back later.

Fused kernels, torch.compile, float8, upcasting, fused LoRA, dequantisation and tensor parallelism
change what one module of a model computes. Weights and their names stay, so that a checkpoint does
not show it. All go through here: each module remembers what it was before.

This is a module of the ground because `model/` and `distributed/` both patch modules, and neither
of the two imports the other.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

RECORD = "_tunesmith_swaps"
"""Attribute of a changed module: its changes, the oldest first. The record lies on the module, not
in an object beside the model, so that a deep copy of the model (the frozen reference model) can be
restored as well, and so can a model of which only the outermost module is at hand.
"""


@dataclass(frozen=True, slots=True)
class _Change:
    """What one swap changed of one module."""

    swap: str
    what: Literal["forward", "__class__"]
    before: Any  # None: the forward was the class's own


@dataclass(frozen=True, slots=True)
class ModuleSwap:
    """One reason to change single modules. Swaps of several reasons on one module are undone in any
    order.
    """

    name: str

    def set_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let `forward`, which takes the module first, compute what the module computes."""
        _record(module, _Change(self.name, "forward", module.__dict__.get("forward")))
        # A method of this module: deepcopy binds the copy's method to the copy.
        module.__dict__["forward"] = types.MethodType(forward, module)

    def set_class(self, module: nn.Module, new: type[nn.Module]) -> None:
        """Make it a module of the class `new`, which needs no other attributes than it has."""
        _record(module, _Change(self.name, "__class__", type(module)))
        module.__class__ = new

    def swapped(self, root: nn.Module) -> list[nn.Module]:
        """The modules of `root` that this swap has changed."""
        return [m for m in root.modules() if any(c.swap == self.name for c in _changes(m))]

    def restore(self, root: nn.Module) -> None:
        """Undo what this swap changed of the modules of `root`."""
        for module in root.modules():
            _undo(module, [c for c in _changes(module) if c.swap == self.name])

    @contextmanager
    def restoring(self, root: nn.Module) -> Iterator[None]:
        """Restore `root` on leaving."""
        try:
            yield
        finally:
            self.restore(root)


def restore_all(root: nn.Module) -> None:
    """Undo every swap of the modules of `root`."""
    for module in root.modules():
        _undo(module, _changes(module))


@contextmanager
def without_forwards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the modules compute by the forward of their class inside; the swapped one is back on
    leaving.
    """
    swapped = [module for module in modules if "forward" in module.__dict__]
    held = [(module, module.__dict__.pop("forward")) for module in swapped]
    try:
        yield
    finally:
        for module, forward in held:
            module.__dict__["forward"] = forward


def _changes(module: nn.Module) -> list[_Change]:
    return module.__dict__.get(RECORD, [])


def _record(module: nn.Module, change: _Change) -> None:
    module.__dict__[RECORD] = [*_changes(module), change]


def _undo(module: nn.Module, changes: Iterable[_Change]) -> None:
    for change in reversed(list(changes)):
        left = _changes(module)
        at = next(i for i, other in enumerate(left) if other is change)
        later = next((i for i in range(at + 1, len(left)) if left[i].what == change.what), None)
        if later is None:
            _put_back(module, change)
        else:  # another swap lies on top of this one: that one goes back to what was before both
            left = [*left]
            left[later] = replace(left[later], before=change.before)
        module.__dict__[RECORD] = [c for i, c in enumerate(left) if i != at]
    if not _changes(module):
        module.__dict__.pop(RECORD, None)


def _put_back(module: nn.Module, change: _Change) -> None:
    if change.what == "__class__":
        module.__class__ = change.before
    elif change.before is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = change.before
