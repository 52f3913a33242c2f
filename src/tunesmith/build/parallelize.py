"""How several ranks share a model: what each holds, and which recipes that goes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunesmith.build.context_parallel import check_context_recipe, check_exact, check_model
from tunesmith.build.parity import ELEMENTWISE
from tunesmith.build.tensor_parallel import (
    check_tensor_recipe,
    sharded_fraction,
    tensor_parallelize_checked,
)
from tunesmith.config.schema import Recipe
from tunesmith.distributed.grad_sync import DataParallelSync, NoSync
from tunesmith.distributed.peer_check import can_check, can_retry
from tunesmith.distributed.world import PeerCheckScope, World
from tunesmith.errors import ModelError, RecipeError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.deferred_load import release
from tunesmith.model.memory.estimate import MemoryEstimate
from tunesmith.model.ops.bf16_upcast import restore_linear_layers

ADAPTERS = ("none", "lora")
KEPT = ("none", "nf4", "fp4")
"""How a base may be kept whose packed bytes ranks can hold in parts."""


def check_parallelism(recipe: Recipe, world: World, device: str) -> None:
    """Refuse what can't be spread over ranks on this kind of device, before anything is loaded.

    Raises:
        RecipeError: names the key and what to give instead.
    """
    check_context_recipe(recipe, world)
    check_tensor_recipe(recipe, world)
    if recipe.device.shard == "none":
        if recipe.device.shard_offload:
            raise RecipeError(
                "only shards are kept in the host's memory",
                where="device.shard_offload",
                hint="add device.shard=full, or take it away",
            )
        return
    if world.is_single:
        raise RecipeError(
            "one process has nobody to share the model with",
            where="device.shard",
            hint="device.ranks=2 or more, torchrun, or device.shard=none",
        )
    _check_hybrid(recipe, world)
    _check_kind(recipe, device)


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
    """The ranks as the recipe groups them, if it can be spread over them.

    Raises:
        RecipeError: names the key and what to give instead.
    """
    check_parallelism(recipe, world, device)
    patience, asking = recipe.device.rank_timeout, _peer_check_scope(recipe, world, device)
    shared = world.with_context_parallel(
        recipe.device.context_parallel, timeout_minutes=patience, peer_check=asking
    )
    return shared.with_tensor_parallel(
        recipe.device.tensor_parallel, timeout_minutes=patience, peer_check=asking == "group"
    )


def _peer_check_scope(recipe: Recipe, world: World, device: str) -> PeerCheckScope:
    """Who meets before a rank waits for others inside a micro-batch: all where they share layers,
    since a rank that has failed can come to one meeting only.
    """
    if recipe.device.shard == "none" or world.is_single:
        return "group" if can_check(device) else "nobody"
    return "all" if can_retry(world.size, device) else "nobody"


def _check_hybrid(recipe: Recipe, world: World) -> None:
    nodes, rest = divmod(world.size, world.local_size)
    if recipe.device.shard == "hybrid" and (nodes < 2 or rest or world.local_size < 2):
        raise RecipeError(
            f"hybrid spreads over the ranks of a machine and copies across machines, and these "
            f"{world.size} ranks are {world.local_size} a machine",
            where="device.shard",
            hint="device.shard=full",
        )


def _check_kind(recipe: Recipe, device: str) -> None:
    shard = recipe.device.shard
    for key, value, taken, hint in (
        ("optim.name", recipe.optim.name, ELEMENTWISE, "looks at whole weights"),
        ("adapter.kind", recipe.adapter.kind, ADAPTERS, "needs whole weights of its base"),
        ("model.quantization", recipe.model.quantization, KEPT, "can't be taken apart"),
    ):
        if value not in taken:
            raise RecipeError(
                f"{value} {hint}, and device.shard={shard} gives each rank a part",
                where=key,
                hint=f"{key}={taken[0]}, or device.shard=none",
            )
    if recipe.device.shard_offload and device == "cpu":
        raise RecipeError(
            "on a CPU shards are in the host's memory already",
            where="device.shard_offload",
            hint="device.shard_offload=false",
        )
    if recipe.eval.samples:
        raise RecipeError(
            f"answers can't be generated while the model is spread by device.shard={shard}",
            where="eval.samples",
            hint="eval.samples=0; `tunesmith generate RUN` answers afterwards",
        )


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
    recipe: Recipe, model: CausalLM, world: World, device: torch.device, *, base: Any = None
) -> NoSync:
    """Let the ranks begin from the same trained weights, and spread the model if that is asked.

    `base`: a frozen copy that stays whole on each rank.
    """
    check_model(model, world.cp)
    if world.is_single:
        return NoSync()
    if model.unread is not None:
        release(model)
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
    files, model.unread = model.unread, None
    shards = apply_fsdp(
        model, decoder_layers(model), world, how,
        device=device, read=None if files is None else files.read_for,
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
