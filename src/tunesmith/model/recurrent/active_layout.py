"""The layout of the micro-batch that runs now, for layers that are not given it as an argument.

Transformers hands the keyword `layout` down to attention, but not to every recurrent mixer (Mamba 1
gets no keywords at all). So it is kept in a context variable for the time of a forward pass.

Activation checkpointing runs layers again in the backward pass, when the forward pass has ended, on
CUDA in a thread of autograd's. `recompute_contexts` takes the layout along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from tunesmith.errors import ModelError
from tunesmith.types import Layout

_UNKNOWN: Any = object()  # outside of a forward pass of ours; None is a batch without a layout
_ACTIVE: ContextVar[Layout | None] = ContextVar("tunesmith_layout", default=_UNKNOWN)


@contextmanager
def use_layout(layout: Layout | None) -> Iterator[None]:
    """Inside, recurrent layers run by this layout; None: the tokens are one sequence."""
    token = _ACTIVE.set(layout)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_layout() -> Layout | None:
    """The layout of the forward pass that runs now; None outside of one.

    Raises:
        ModelError: a layer is recomputed by a checkpointing function that did not keep the layout.
            Without this check its documents would be mixed silently.
    """
    found = _ACTIVE.get()
    if found is not _UNKNOWN:
        return found
    # torch's own checkpointing asks in the same way whether a backward pass is running
    if torch._C._current_graph_task_id() != -1:  # pyright: ignore[reportAttributeAccessIssue]
        raise ModelError(
            "a recurrent layer is recomputed in the backward pass without its micro-batch's layout",
            where="device.gradient_checkpointing",
            hint="let device.gradient_checkpointing choose it, not the model's own switch",
        )
    return None


def recompute_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts for a layer's forward pass and for its recomputation, as `context_fn` of
    torch.utils.checkpoint returns them.
    """
    found = _ACTIVE.get()
    # a plain forward pass has no layout, and its recomputation must be told so
    return nullcontext(), use_layout(None if found is _UNKNOWN else found)
