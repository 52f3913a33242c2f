"""Ranks that share the tokens of a micro-batch: which recipes and models that goes with, and that
it is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.config.schema import Recipe
from tunesmith.data.batch import collate
from tunesmith.data.packing import MicrobatchPlan, plan_step
from tunesmith.distributed.context import Context, uneven_heads
from tunesmith.distributed.ranks import Ranks
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.train.dealt import own_part
from tunesmith.types import Document, Origin, Segment

PROBED_TOKENS = 24
"""Tokens of the longer one of two made-up documents."""
ROUNDING = {"cpu": 2e-4, "other": 5e-3, "narrow": 8e-2}
"""What rounding may change of a hidden state, relative: float32 on a CPU and elsewhere, 16 bits."""


def check_context_recipe(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse what can't be shared by so many ranks, before anything is loaded.

    Raises:
        RecipeError: names the key and what to give instead.
    """
    context = recipe.device.context
    if context == 1:
        return
    if ranks.alone:
        raise RecipeError(
            "one process has nobody to share a sequence with",
            where="device.context",
            hint=f"device.ranks={context} or a multiple of it, torchrun, or device.context=1",
        )
    if ranks.count % context:
        fitting = [n for n in range(1, context) if ranks.count % n == 0]
        raise RecipeError(
            f"{ranks.count} ranks can't be divided into groups of {context}",
            where="device.context",
            hint=f"device.context={fitting[-1]}, or a multiple of {context} ranks",
        )
    section = recipe.objective
    for where, asked, why in (
        ("device.attention", recipe.device.attention == "isolated", "takes whole paths"),
        ("objective.router_aux", section.router_aux > 0, "looks at all tokens of a path at once"),
        (
            "objective.scheduled_sampling",
            section.scheduled_sampling > 0,
            "writes guesses over tokens that another rank may have",
        ),
    ):
        if asked:
            raise RecipeError(
                f"this {why}, and device.context={context} gives each rank a slice of them",
                where=where,
                hint=f"leave {where} at its default, or device.context=1",
            )


def check_model(model: CausalLM, context: Context) -> None:
    """Refuse a model whose sequences can't be shared.

    Raises:
        ModelError: its heads can't be dealt, or it takes one path at a time only.
    """
    if context.count == 1:
        return
    if model.isolated:
        raise ModelError(
            "this model runs one path at a time with its own attention, which needs all tokens "
            "of a path on one device",
            where="device.context",
            hint="device.context=1",
        )
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % context.count:
        raise uneven_heads(heads, context.count)


def check_exact(
    model: CausalLM, ranks: Ranks, *, device: torch.device, compute: torch.dtype
) -> None:
    """Hold this model, its tokens shared by the ranks, to what each of them computes alone.

    Two made-up documents, on all ranks at the same time, with weights whole or spread; `compute` is
    the model's own precision.

    Raises:
        ModelError: hidden states differ by more than rounding.
    """
    if ranks.context.count == 1:
        return
    rounding = rounding_of(compute, device)
    apart = _difference(model, ranks.context, device, robust=rounding == ROUNDING["narrow"])
    (worst,) = ranks.most([apart / rounding])
    if not worst <= 1:
        raise ModelError(
            f"this model gives other results where ranks share its tokens, {worst:.1e} times what "
            "rounding explains",
            where="device.context",
            hint="device.context=1",
        )


def rounding_of(compute: torch.dtype, device: torch.device) -> float:
    """What rounding may change, relative."""
    if compute in (torch.bfloat16, torch.float16):
        return ROUNDING["narrow"]
    return ROUNDING["cpu" if device.type == "cpu" else "other"]


def _difference(model: CausalLM, context: Context, device: torch.device, *, robust: bool) -> float:
    """The largest relative difference of a token's hidden states; `robust`: the median, since in 16
    bits rounding can flip an expert of a token.
    """
    plan = probe_plan(model)
    part = own_part(plan, context)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole, found = (model(collate(p, device), states_only) for p in (plan, part))
    finally:
        model.train(training)
    assert isinstance(whole, Tensor)
    assert isinstance(found, Tensor)
    own = part.layout.own
    wanted = whole[own.start : own.stop].float()  # without what was added at the end
    if not len(wanted):
        return 0.0
    apart = (found[: len(wanted)].float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(apart.median() if robust else apart.max())


def probe_plan(model: CausalLM) -> MicrobatchPlan:
    """Two made-up documents as a micro-batch."""
    vocabulary = int(model.head.weight.shape[0])
    documents = [_document(length, vocabulary) for length in (PROBED_TOKENS, PROBED_TOKENS // 3)]
    (plan,) = plan_step(documents, micro_tokens=2 * PROBED_TOKENS)
    return plan


def states_only(hidden: Tensor, *_: Any, **__: Any) -> Any:
    """A head that gives back the hidden states."""
    return hidden


def _document(tokens: int, vocabulary: int) -> Document:
    ids = np.linspace(vocabulary // 8, vocabulary // 2, tokens).astype(np.int32)
    index = np.arange(1, tokens, dtype=np.int32)
    segment = Segment(ids, -1, 0, index, np.ones(len(index), np.float32), np.zeros_like(index))
    return Document((segment,), Origin("probe", tokens))


def context_line(context: int, ranks: int, *, longest: int) -> list[str]:
    """How micro-batches are spread where ranks share them; nothing where they don't."""
    if context == 1:
        return []
    groups = ranks // context
    size = -(-longest // context)
    dealt = f"{groups} groups of {context} ranks" if groups > 1 else f"{context} ranks"
    return [
        f"context: {dealt}, each rank with 1/{context} of its micro-batch's tokens; of the longest "
        f"path, {longest:,} tokens, at most {size:,} on a rank"
    ]
