"""Context parallelism (DeepSpeed-Ulysses): which models it fits, and a check that it is exact on
this machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.build.parity import (
    probe_plan,
    states_only,
)
from tunesmith.distributed.context_parallel import ContextParallel, uneven_heads
from tunesmith.distributed.world import World
from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.numerics import (
    NARROW,
    Comparison,
    equivalence_trial,
    whole_model_bound,
)
from tunesmith.model.recurrent.replace import is_recurrent
from tunesmith.train.microbatches import collate, local_part


def check_model(model: CausalLM, cp: ContextParallel) -> None:
    """Refuse a model whose sequences can't be shared.

    Raises:
        ModelError: its heads can't be dealt, or it takes one path at a time only.
    """
    if cp.size == 1:
        return
    if model.unpacked:
        raise ModelError(
            "this model runs one path at a time with its own attention, which needs all tokens "
            "of a path on one device",
            where="device.context_parallel",
            hint="device.context_parallel=1",
        )
    if is_recurrent(model):
        raise ModelError(
            "this model has recurrent layers, which need all tokens of a path on one device",
            where="device.context_parallel",
            hint="device.context_parallel=1",
        )
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int) and heads % cp.size:
        raise uneven_heads(heads, cp.size)


def check_exact(
    model: CausalLM, world: World, *, device: torch.device, compute: torch.dtype
) -> None:
    """Hold this model, its tokens shared by the ranks, to what each of them computes alone.

    Two made-up documents, on all ranks at the same time, with weights whole or spread; `compute` is
    the model's own precision.

    Raises:
        ModelError: hidden states differ by more than rounding.
    """
    if world.cp.size == 1:
        return
    bound, narrow = whole_model_bound(compute, device), compute in NARROW
    verdict = equivalence_trial(
        lambda: _compared(model, world.cp, device, bound=bound, narrow=narrow), catch=()
    )
    (worst,) = world.all_reduce_max([verdict.excess])
    if not worst <= 1:
        raise ModelError(
            f"this model gives other results where ranks share its tokens, {worst:.1e} times what "
            "rounding explains",
            where="device.context_parallel",
            hint="device.context_parallel=1",
        )


def _compared(
    model: CausalLM, cp: ContextParallel, device: torch.device, *, bound: float, narrow: bool
) -> list[Comparison]:
    """This rank's hidden states, and those of one process."""
    plan = probe_plan(model)
    part = local_part(plan, cp)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole, found = (model(collate(p, device), states_only) for p in (plan, part))
    finally:
        model.train(training)
    assert isinstance(whole, Tensor)
    assert isinstance(found, Tensor)
    local = part.layout.local
    wanted = whole[local.start : local.stop]  # without what was added at the end
    if not len(wanted):
        return []
    return [Comparison(found[: len(wanted)], wanted, bound, rows=True, robust=narrow)]


def context_line(context: int, ranks: int, *, longest: int) -> list[str]:
    """How micro-batches are spread where ranks share them; nothing where they don't."""
    if context == 1:
        return []
    groups = ranks // context
    size = -(-longest // context)
    groups_text = f"{groups} groups of {context} ranks" if groups > 1 else f"{context} ranks"
    return [
        f"context: {groups_text}, each rank with 1/{context} of its micro-batch's tokens; of the "
        f"longest path, {longest:,} tokens, at most {size:,} on a rank"
    ]
