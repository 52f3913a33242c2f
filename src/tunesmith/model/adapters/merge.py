"""Merge an adapter into the weights of its base."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError, first_line
from tunesmith.model.adapters.add import adapted_names
from tunesmith.model.adapters.state import AdapterState
from tunesmith.model.causal_lm import CausalLM


def fold(causal_lm: CausalLM, adapter: AdapterState) -> AdapterState:
    """Put the adapter into the weights and take peft's layers away; in float32 it changes nothing
    but rounding. Returns what is left of the adapter's state.

    A head tied to the embedding becomes a weight of its own where the adapter is on one of the
    two, since they differ from then on.

    Raises:
        ModelError: a merged weight is not finite.
    """
    untied = adapts_output(causal_lm) and untie(causal_lm)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tied weights, which are not tied any more
            causal_lm.replace_model(causal_lm.model.merge_and_unload(safe_merge=True))
    except ValueError as error:
        raise ModelError(f"the adapter can't be merged: {first_line(error)}") from error
    return replace(adapter, start=None, untied=adapter.untied or untied)


def adapts_output(causal_lm: CausalLM) -> bool:
    """True where an adapter is on the embedding or the head."""
    base = causal_lm.base
    outer = [base.get_input_embeddings(), base.get_output_embeddings()]
    return any(base.get_submodule(name) in outer for name in _modules(causal_lm))


def untie(causal_lm: CausalLM) -> bool:
    """Give the head a weight of its own, if it shares that of the embedding; whether it did."""
    base = causal_lm.base
    head = _inner(base.get_output_embeddings())
    if head.weight is not _inner(base.get_input_embeddings()).weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}
    return True


@torch.no_grad()
def add_difference(
    total: dict[str, Tensor], merged: dict[str, Tensor], base: dict[str, Tensor], *, weight: float
) -> None:
    """total += weight * (merged - base), name by name and in place."""
    for name, tensor in total.items():
        tensor.add_(merged[name] - base[name], alpha=weight)


def merged_names(causal_lm: CausalLM) -> list[str]:
    """Modules and parameters of the base that merging changes; embedding and head always, since
    rows of them may be trained beside an adapter.
    """
    base = causal_lm.base
    outer = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    named = [name for name, module in base.named_modules() if id(module) in outer]
    return [*adapted_names(causal_lm), *named]


def _modules(causal_lm: CausalLM) -> list[str]:
    there = dict(causal_lm.base.named_modules())
    return [name for name in adapted_names(causal_lm) if name in there]


def _inner(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module
