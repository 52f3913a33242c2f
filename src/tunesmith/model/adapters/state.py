"""State of a peft adapter that neither the model nor peft's config shows: the initial A and B of
PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775), LoftQ's quantised base, new token rows.

Attaching an adapter returns it, and whatever writes or merges the adapter takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdapterState:
    """What loading a model and attaching an adapter leave for the export."""

    start: Mapping[str, Tensor] | None = None  # the initial adapter, taken from the base
    of_quantized: bool = False  # the adapter began with what quantising took from the base
    new_rows: tuple[int, ...] = ()  # ids of tokens that the template added to the tokenizer
    untied: bool = False  # head and embedding differ since an adapter on one of them was merged


NO_ADAPTER = AdapterState()
"""Of a model without an adapter, and of one whose adapter left nothing behind."""
