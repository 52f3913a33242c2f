"""Tensor parallelism (Megatron): which models it fits, and a check that it is exact on this
machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.build.parity import (
    probe_plan,
    states_only,
)
from tunesmith.distributed.grad_sync import NoSync
from tunesmith.distributed.oom import is_out_of_memory
from tunesmith.distributed.tensor_parallel import TensorParallelSync, TPPlan, tensor_parallelize
from tunesmith.distributed.world import World
from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.bf16_upcast import restore_linear_layers
from tunesmith.model.ops.numerics import (
    NARROW,
    Comparison,
    equivalence_trial,
    whole_model_bound,
)
from tunesmith.model.recurrent.replace import is_recurrent
from tunesmith.model.tp_plan import KEY, LayerPlan, layer_plan
from tunesmith.train.microbatches import collate

ROUGHER = 5
"""How much more rounding to 16 bits may change a gradient than a hidden state. Where a rank's term
was missing it would be off by more than half.
"""


def sharded_fraction(model: CausalLM, world: World) -> float:
    """The share of the model's parameters of which each rank has a part.

    Raises:
        ModelError: it can't be divided.
    """
    return 0.0 if world.tp.size == 1 else _plan_of(model, world).sharded_fraction(model)


def _plan_of(model: CausalLM, world: World) -> LayerPlan:
    if model.unpacked:
        raise ModelError(
            "this model runs one path at a time with its own attention, which is not divided",
            where=KEY,
            hint=f"{KEY}=1",
        )
    if is_recurrent(model):
        raise ModelError(
            "this model has recurrent layers, which are not divided", where=KEY, hint=f"{KEY}=1"
        )
    return layer_plan(model, world.tp.size)


def tp_plan_of(model: CausalLM, world: World) -> TPPlan:
    """What of the model is divided.

    Raises:
        ModelError: it can't be.
    """
    plan = _plan_of(model, world)
    embedding = model.base.get_input_embeddings()
    partial_grad = [*plan.partial_grad, embedding, model.head]  # each rank has its own targets
    return TPPlan(
        plan.colwise,
        plan.rowwise,
        plan.sharded,
        partial_grad,
        embedding,
        before_head=model.before_head,
    )


def tensor_parallelize_checked(
    model: CausalLM, world: World, device: torch.device
) -> TensorParallelSync:
    """Give each rank its part of the layers, if that computes the same.

    Every rank comes with the whole model, of the same weights, in the host's memory.

    Raises:
        ModelError: it can't be divided, or differs by more than rounding.
    """
    if device.type != "cpu":
        restore_linear_layers(model)
    plan = tp_plan_of(model, world)
    probes = _probes(model, plan)
    wanted = _probe(model, probes, terms=1)
    shards = tensor_parallelize(model, plan, world, device)
    try:
        with world.naming_lost_rank():
            found = _probe(model, probes, terms=world.tp.size)
            apart = equivalence_trial(
                lambda: _compared(wanted, found, probes, world), catch=()
            ).excess
    except (RuntimeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"this model does not run in parts: {error}", where=KEY, hint=f"{KEY}=1"
        ) from error
    (worst,) = world.all_reduce_max([apart])
    if not worst <= 1:
        raise ModelError(
            f"this model differs in parts, {worst:.1e} times what rounding explains",
            where=KEY,
            hint=f"{KEY}=1",
        )
    shards.clear()
    return shards


@dataclass(frozen=True, slots=True)
class _Probed:
    parameter: Tensor
    dimension: int | None
    partial_grad: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a made-up micro-batch gives: hidden states, and gradients of what is looked at."""

    hidden: Tensor
    gradients: Sequence[Tensor]
    compute: torch.dtype


def _probes(model: CausalLM, plan: TPPlan) -> list[_Probed]:
    """What is trained of the decoder's whole parameters but the embedding, and of the divided ones
    the first of either kind: the backward pass to them goes through all trained layers.
    """
    partial_grad = {id(p) for module in plan.partial_grad for p in module.parameters()}
    excluded = {id(p) for p in plan.embedding.parameters()}
    trained = [(p, n) for p, n in plan.sharded if p.requires_grad]
    first = {n: p for p, n in reversed(trained)}
    whole = [
        p
        for p in model.decoder.parameters()
        if p.requires_grad and id(p) not in excluded and plan.shard_dim(p) is None
    ]
    return [_Probed(p, plan.shard_dim(p), id(p) in partial_grad) for p in (*whole, *first.values())]


def _probe(model: CausalLM, probes: Sequence[_Probed], *, terms: int) -> _Seen:
    """`terms`: how many ranks' gradients of the hidden states are added up."""
    training = model.training
    model.eval()
    device = model.head.weight.device
    try:
        hidden = model(collate(probe_plan(model), device), states_only)
    finally:
        model.train(training)
    assert isinstance(hidden, Tensor)
    toward = torch.arange(hidden.numel(), device=device).view_as(hidden).float().cos()
    value = (hidden.float() * toward).sum() / terms
    wanted = [probe.parameter for probe in probes]
    gradients = torch.autograd.grad(value, wanted) if wanted else ()
    return _Seen(hidden.detach(), gradients, model.head.weight.dtype)


def _compared(
    wanted: _Seen, found: _Seen, probes: Sequence[_Probed], world: World
) -> Iterator[Comparison]:
    """Hidden states, by token, and this rank's part of each gradient."""
    split, device = world.tp, found.hidden.device
    states, narrow = whole_model_bound(found.compute, device), found.compute in NARROW
    gradients = states * (ROUGHER if narrow else 1)
    yield Comparison(found.hidden, wanted.hidden, states, rows=True, robust=narrow)
    for probe, one, local in zip(probes, wanted.gradients, found.gradients, strict=True):
        if probe.dimension is not None:
            one = one.chunk(split.size, probe.dimension)[split.rank]
        one, local = one.to(device).float(), local.float()
        if probe.partial_grad:
            local = split.all_reduce(local.clone())
        yield Comparison(local, one, gradients)


def tensor_line(world: World, grad_sync: NoSync) -> list[str]:
    """How the layers are divided, where they are."""
    if not isinstance(grad_sync, TensorParallelSync):
        return []
    count, share = world.tp.size, grad_sync.sharded_fraction
    copies = f", {world.dp_size} copies" if world.dp_size > 1 else ""
    return [
        f"tensor: {count} ranks hold one copy of the layers{copies}; {share:.0%} of the parameters "
        f"are divided, each rank has {1 - share + share / count:.0%} of all"
    ]
