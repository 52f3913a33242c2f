"""Let the recurrent mixers of a transformers model follow the layout of their micro-batch.

A mixer is known by what its `forward` calls. It keeps its own forward, run with other functions
under the names it calls, and only while a layout is active: without one (generation, one document
at a time) nothing is different. Transformers' modules are not changed.

Under a layout the functions are transformers' torch operations, also where a kernel of fla,
mamba-ssm or causal-conv1d would be called without one: the gradients of their initial and final
states have not been tried.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from tunesmith.model.recurrent.active_layout import active_layout
from tunesmith.model.recurrent.mixers import MIXERS
from tunesmith.model.recurrent.recurrences import RECURRENCES
from tunesmith.module_swap import ModuleSwap
from tunesmith.types import Layout

SWAP = ModuleSwap("recurrent layers")


def follow_layouts(root: nn.Module) -> int:
    """Swap the forwards of all known recurrent modules of `root`; how many there are."""
    for module in root.modules():
        forward = _following(type(module))
        if forward is not None:
            SWAP.set_forward(module, forward)
        for known in MIXERS:
            known.swap(module, SWAP)
    return len(SWAP.swapped(root))


def is_recurrent(root: nn.Module) -> bool:
    """Whether modules of `root` follow layouts by `follow_layouts`."""
    return bool(SWAP.swapped(root))


def restore(root: nn.Module) -> None:
    """Undo `follow_layouts`."""
    SWAP.restore(root)


def _following(mixer: type[nn.Module]) -> Callable[..., Any] | None:
    plain: Any = inspect.unwrap(mixer.forward)
    if not isinstance(plain, types.FunctionType):
        return None
    called = RECURRENCES.keys() & set(plain.__code__.co_names) & plain.__globals__.keys()
    if not called:
        return None

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        layout = active_layout()
        if layout is None:
            return mixer.forward(self, *inputs, **named)
        return _rebound(plain, called, layout)(self, *inputs, **named)

    return forward


def _rebound(plain: Any, called: set[str], layout: Layout) -> Callable[..., Any]:
    """The same function, which finds other functions under the names of `called`."""
    around = plain.__globals__
    # unwrapped: what transformers puts around it looks for kernels
    others = {name: RECURRENCES[name](layout, inspect.unwrap(around[name])) for name in called}
    found = types.FunctionType(
        plain.__code__, {**around, **others}, plain.__name__, plain.__defaults__, plain.__closure__
    )
    found.__kwdefaults__ = plain.__kwdefaults__
    return found
