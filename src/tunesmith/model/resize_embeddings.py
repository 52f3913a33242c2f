"""New rows of the embedding and the head for tokens that were added to the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.source import read_json

_MULTIPLE = 64
"""Vocabularies padded to a multiple of this stay so: matrix products of odd sizes are slow."""


def add_rows(causal_lm: CausalLM, ids: Sequence[int], *, padded: bool) -> list[str]:
    """Give the new tokens `ids` rows that begin as the mean of all rows before them.

    Spare rows at the end of the matrices are used first; nothing is ever cut off. `padded`: a
    matrix that has to grow stays a multiple of 64 if it was one. A bias of the head gets its mean
    too. Returns what is to be said about it.

    Raises:
        ModelError: the model keeps another table by token, or goes on with an adapter.
    """
    if not ids:
        return []
    name = getattr(causal_lm.config, "_name_or_path", None) or type(causal_lm.base).__name__
    if hasattr(causal_lm.model, "peft_config"):
        raise ModelError(
            f"the template needs {len(ids)} new tokens, but the model comes with an adapter",
            where=name,
            hint="merge it first, then train on the merged model",
        )
    needed, first = max(ids) + 1, min(ids)
    old = _rows(causal_lm.base)
    _refuse_other_tables(causal_lm.base, needed, name)
    if needed > old:
        size = needed
        if padded and old % _MULTIPLE == 0:
            size = -(-needed // _MULTIPLE) * _MULTIPLE
        causal_lm.base.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(causal_lm.base):
            _fill_mean(table, [*ids, *range(max(needed, old), table.shape[0])], min(first, old))
    grown = f"the vocabulary grows from {old:,} to {_rows(causal_lm.base):,} rows"
    how = grown if needed > old else f"spare rows of the {old:,} are used"
    return [f"{len(ids)} new tokens of the template begin as the mean of all rows; {how}"]


def trained_rows(causal_lm: CausalLM, new_rows: Sequence[int]) -> dict[str, list[int]] | None:
    """peft's `trainable_token_indices` for the new rows, by name of the module that holds them.

    Raises:
        ModelError: the head has a bias, which peft leaves out beside such rows.
    """
    if not new_rows:
        return None
    base = causal_lm.base
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head.bias is not None:
        raise ModelError(
            "the template needs new tokens, and an adapter can't carry rows of a head with a bias",
            where=getattr(causal_lm.config, "_name_or_path", None),
            hint="adapter=none, or a template whose tokens the tokenizer has",
        )
    names = {id(module): name for name, module in base.named_modules()}
    rows = list(new_rows)
    found = {names[id(embedding)]: rows}
    if head.weight is not embedding.weight:
        found[names[id(head)]] = rows
    return found


def make_room_for_adapter(model: Any, folder: Path) -> None:
    """Let the embedding have the rows that the adapter in `folder` fills."""
    asked = read_json(folder / "adapter_config.json").get("trainable_token_indices")
    lists = list(asked.values()) if isinstance(asked, dict) else [asked or []]
    needed = max((int(row) + 1 for rows in lists for row in rows), default=0)
    if needed > _rows(model):
        model.resize_token_embeddings(needed, mean_resizing=False)


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _tables(model: Any) -> list[Tensor]:
    """Weights and biases with a row a token, tied ones once."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embedding.weight, head.weight, head.bias]
    return list({id(table): table for table in tables if table is not None}.values())


def _fill_mean(table: Tensor, rows: Sequence[int], before: int) -> None:
    mean = table[:before].double().mean(0)
    table[list(rows)] = mean.to(table.dtype)


def _refuse_other_tables(model: Any, needed: int, name: str) -> None:
    """Some families look tokens up in a second table, which would not grow with the first."""
    embedding = model.get_input_embeddings()
    for path, module in model.named_modules():
        other = isinstance(module, nn.Embedding) and module is not embedding
        if other and _rows(model) - 1024 <= module.num_embeddings < needed:
            raise ModelError(
                f"{path} is a second table by token, which can't be given new rows",
                where=name,
                hint="a template whose tokens the tokenizer has",
            )
