"""The tensor-parallel plan of a model: colwise and rowwise linears after transformers'
`base_model_tp_plan`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.bf16_upcast import UpcastLinear

COLWISE, ROWWISE, PARTIAL_GRAD = "colwise", "rowwise", "replicated_with_grad_allreduce"
"""Names in transformers' plans: maps whose outputs are dealt, maps whose inputs are, and modules
between them, whole, which see this rank's heads only.
"""
KEY = "device.tensor_parallel"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Modules of the decoder's layers by what is done with them; all others stay whole."""

    colwise: Sequence[nn.Module]  # linear maps, inside a low-rank adapter or not
    rowwise: Sequence[nn.Module]
    partial_grad: Sequence[nn.Module]
    sharded: Sequence[tuple[Tensor, int]]  # and along which dimension

    def sharded_fraction(self, model: nn.Module) -> float:
        """Of the model's parameters those that are divided."""
        sharded = sum(parameter.numel() for parameter, _ in self.sharded)
        return sharded / sum(p.numel() for p in model.parameters())


def layer_plan(model: CausalLM, count: int) -> LayerPlan:
    """How the layers are divided over `count` ranks. Embedding, final norm and head stay whole,
    whatever the plan has for them.

    Raises:
        ModelError: the family has no plan, one that is not of plain pairs of linear maps, or its
            widths can't be divided so.
    """
    config = model.config.get_text_config()
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    found: dict[str, list[Any]] = {COLWISE: [], ROWWISE: [], PARTIAL_GRAD: []}
    members = dict(model.decoder.named_modules()) | dict(model.decoder.named_parameters())
    for name, member in members.items():
        style = plan.get(re.sub(r"\d+", "*", name))
        if style is None or "*" not in re.sub(r"\d+", "*", name):
            continue
        if style not in found or (style != PARTIAL_GRAD and not _can_shard(member)):
            raise ModelError(
                f"transformers' plan for {config.model_type} has {name} as {style}, and only "
                "plain linear maps in pairs are divided here",
                where=KEY,
                hint=f"{KEY}=1; device.shard=full spares the weights' memory",
            )
        found[style].append(member)
    if not found[COLWISE] or not found[ROWWISE]:
        raise ModelError(
            f"transformers has no plan that divides the layers of {config.model_type}",
            where=KEY,
            hint=f"{KEY}=1; device.shard=full spares the weights' memory",
        )
    columns, rows, partial_grad = found.values()
    _check_widths(config, columns, rows, count)
    sharded: list[tuple[Tensor, int]] = []
    for module in columns:
        sharded += [(p, 0) for p in _linear(module).parameters(recurse=False)]
        sharded += [(up.weight, 0) for up in _low_rank(module, "lora_B")]
        partial_grad += _low_rank(module, "lora_A")
    for module in rows:
        sharded += [(p.weight, 1) for p in (_linear(module), *_low_rank(module, "lora_A"))]
        partial_grad += _low_rank(module, "lora_B")
    return LayerPlan(columns, rows, partial_grad, sharded)


def _linear(module: Any) -> nn.Linear:
    return getattr(module, "base_layer", module)


def _low_rank(module: Any, matrix: str) -> list[nn.Linear]:
    return list(getattr(module, matrix, {}).values())


def _can_shard(module: Any) -> bool:
    """A plain linear map, alone or with additions of low rank that have nothing else to them."""
    if type(_linear(module)) not in (nn.Linear, UpcastLinear):
        return False
    if not hasattr(module, "base_layer"):
        return True
    maps = (*_low_rank(module, "lora_A"), *_low_rank(module, "lora_B"))
    plain = all(type(m) in (nn.Linear, UpcastLinear) and m.bias is None for m in maps)
    return bool(maps) and plain and not getattr(module, "lora_variant", None)


def _check_widths(
    config: Any, columns: Sequence[nn.Module], rows: Sequence[nn.Module], count: int
) -> None:
    widths = {
        "attention heads": [getattr(config, "num_attention_heads", count)],
        "key heads": [getattr(config, "num_key_value_heads", None) or count],
        "features of a linear map": [_linear(m).out_features for m in columns]
        + [_linear(m).in_features for m in rows],
    }
    for what, sizes in widths.items():
        uneven = [size for size in sizes if size % count]
        if uneven:
            every = [size for found in widths.values() for size in found]
            fitting = [n for n in range(1, count) if not any(size % n for size in every)]
            raise ModelError(
                f"{uneven[0]} {what} can't be dealt to {count} ranks",
                where=KEY,
                hint=f"{KEY}={fitting[-1]}",
            )
