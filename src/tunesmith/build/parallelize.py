"""Parallelism of a run: process groups, data parallelism (DDP), FSDP2 or tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunesmith.build.context_parallel import check_exact, check_model
from tunesmith.build.tensor_parallel import (
    sharded_fraction,
    tensor_parallelize_checked,
)
from tunesmith.config.schema import Recipe
from tunesmith.distributed.grad_sync import DataParallelSync, NoSync
from tunesmith.distributed.peer_check import can_check, can_retry
from tunesmith.distributed.world import PeerCheckScope, World
from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.deferred_load import release
from tunesmith.model.memory.estimate import MemoryEstimate
from tunesmith.model.ops.bf16_upcast import restore_linear_layers
from tunesmith.model.weight_files import WeightFiles


def for_one_process(recipe: Recipe) -> Recipe:
    """The recipe without what only several ranks can do, to look at a run from one process."""
    alone = {
        "ranks": 1,
        "shard": "none",
        "shard_offload": False,
        "context_parallel": 1,
        "tensor_parallel": 1,
    }
    return recipe.model_copy(update={"device": recipe.device.model_copy(update=alone)})


def make_groups(recipe: Recipe, world: World, device: str) -> World:
    """The world with the context- and tensor-parallel groups of the recipe."""
    patience, peer_check = recipe.device.rank_timeout, _peer_check_scope(recipe, world, device)
    shared = world.with_context_parallel(
        recipe.device.context_parallel, timeout_minutes=patience, peer_check=peer_check
    )
    return shared.with_tensor_parallel(
        recipe.device.tensor_parallel, timeout_minutes=patience, peer_check=peer_check == "group"
    )


def _peer_check_scope(recipe: Recipe, world: World, device: str) -> PeerCheckScope:
    """Who meets before a rank waits for others inside a micro-batch: all where they share layers,
    since a rank that has failed can come to one meeting only.
    """
    if recipe.device.shard == "none" or world.is_single:
        return "group" if can_check(device) else "nobody"
    return "all" if can_retry(world.size, device) else "nobody"


def ranks_per_copy(recipe: Recipe, world: World) -> int:
    """How many ranks hold one copy of the model together."""
    if world.tp.size > 1:
        return world.tp.size
    return {"none": 1, "full": world.size, "hybrid": world.local_size}[recipe.device.shard]


def sharded_savings(
    size: MemoryEstimate | None, model: CausalLM, world: World, *, ranks_per_copy: int
) -> int:
    """Bytes of the training state that other ranks hold for this one."""
    if size is None:
        return 0
    share = sharded_fraction(model, world) if world.tp.size > 1 else 1.0
    return int((size.total - size.total // ranks_per_copy) * share)


def parallelize(
    recipe: Recipe,
    model: CausalLM,
    world: World,
    device: torch.device,
    *,
    base: Any = None,
    unread: WeightFiles | None = None,
) -> NoSync:
    """Let the ranks begin from the same trained weights, and spread the model if that is asked.

    `base`: a frozen copy that stays whole on each rank. `unread`: where the weights are, of a model
    that was loaded without them.
    """
    check_model(model, world.cp)
    if world.is_single:
        return NoSync()
    if unread is not None:
        release(model, unread)
    trained = [p for p in model.parameters() if p.requires_grad]
    world.broadcast_([p for p in trained if not p.is_meta])
    first = next(model.base.parameters())
    if world.tp.size > 1:
        if base is not None:
            base.to(device)
        return tensor_parallelize_checked(model, world, device)
    if recipe.device.shard == "none":
        check_exact(model, world, device=device, compute=first.dtype)
        return DataParallelSync(world, trained)
    from tunesmith.distributed.fsdp import FSDPOptions, apply_fsdp

    packed = recipe.model.quantization != "none"
    if packed:
        from tunesmith.model.quantization.fsdp import make_spreadable

        make_spreadable(model, device=device, compute=first.dtype)
    if device.type != "cpu":
        restore_linear_layers(model)
        if base is not None:
            restore_linear_layers(base)
            base.to(device)
    how = FSDPOptions(
        compute=first.dtype,
        hybrid=recipe.device.shard == "hybrid",
        offload=recipe.device.shard_offload,
    )
    shards = apply_fsdp(
        model, decoder_layers(model), world, how,
        device=device, read=None if unread is None else unread.read_for,
    )  # fmt: skip
    if packed:
        from tunesmith.model.quantization.fsdp import mark_packed

        mark_packed(model)
    check_exact(model, world, device=device, compute=first.dtype)
    shards.reshard()
    return shards


def decoder_layers(model: CausalLM) -> list[nn.Module]:
    """The decoder's layers, in order.

    Raises:
        ModelError: they aren't one list.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.decoder.modules() if isinstance(m, nn.ModuleList)]
    found = [layers for layers in lists if len(layers) == wanted]
    if len(found) != 1:
        raise ModelError(
            f"{model.config.model_type} has no one list of layers to spread",
            where="device.shard",
            hint="device.shard=none",
        )
    return list(found[0])
