"""From a recipe to the objects of a run. The only place that sees both the recipe and the parts it
is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.build.adapter import (
    adapter_lines,
    choose_trained,
    noisy_adapter,
    resolved_adapter,
)
from tunesmith.build.compile import (
    check_computing,
    compile_model,
    computed_by,
    computing_lines,
)
from tunesmith.build.context_parallel import context_line
from tunesmith.build.data import (
    data_sources,
    open_template,
    preparation,
    resolve_max_length,
)
from tunesmith.build.deferred_model import load_for_ranks, test_loaded
from tunesmith.build.device import (
    choose_device,
    seed_everything,
)
from tunesmith.build.float8 import check_float8, use_float8
from tunesmith.build.inputs import UserObjects
from tunesmith.build.kernels import choose_kernels
from tunesmith.build.microbatch_size import choose_micro_batch
from tunesmith.build.model import check_memory
from tunesmith.build.objective import (
    make_loss,
    noisy_objective,
    objective_line,
    user_objective,
)
from tunesmith.build.optimizer import make_optimizer
from tunesmith.build.parallelize import make_groups, parallelize, ranks_per_copy, sharded_savings
from tunesmith.build.rank_utilization import idle_line
from tunesmith.build.sampler import pack_prepared, pin_revisions, plan_steps
from tunesmith.build.sources import prepare_all
from tunesmith.build.summary import start_lines
from tunesmith.build.tensor_parallel import tensor_line
from tunesmith.config.schema import Recipe
from tunesmith.data.preprocess.document_store import longest_paths
from tunesmith.distributed.world import World
from tunesmith.model.adapters import AdapterReport
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import resolve_model
from tunesmith.model.memory.activations import MicroChoice
from tunesmith.model.memory.estimate import (
    free_memory,
)
from tunesmith.model.ops.malloc import keep_freed_memory
from tunesmith.model.selftest import SelfTest
from tunesmith.model.source import ModelSource
from tunesmith.optim import auto_lr, schedule, warmup_steps
from tunesmith.train.job import Job
from tunesmith.train.microbatches import model_work
from tunesmith.train.user_objective import COPY, is_own

SINGLE_WORLD = World()


def build(
    recipe: Recipe,
    *,
    objects: UserObjects | None = None,
    folders: Sequence[Path] = (),
    faults_file: Path | None = None,
    world: World = SINGLE_WORLD,
) -> Job:
    """Everything a run needs, checked. `folders`: where data is looked for after the current
    folder. All of `ranks` build at the same time.

    Raises:
        InputError: what the recipe, the data or the model has wrong; nothing was trained.
    """
    objects = objects or UserObjects()
    device = world.device(choose_device(recipe))
    world = make_groups(recipe, world, device.type)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.train.seed)
    check_computing(recipe)
    source = (
        None
        if objects.model is not None
        else resolve_model(recipe.model.name, revision=recipe.model.revision)
    )
    check_float8(recipe, world, source, device)
    together = ranks_per_copy(recipe, world)
    size = check_memory(recipe, source, device, free=_room(device, world) * together)
    own = user_objective(recipe, folders)
    template = open_template(recipe, source, objects)
    max_length = resolve_max_length(recipe, template)
    train, held_out = data_sources(recipe, objects, folders)
    with preparation(recipe, world) as kept:
        prepared, eval_sets = world.main_process_first(
            lambda: prepare_all(
                train,
                held_out,
                template,
                recipe.data,
                max_length=max_length,
                faults_file=faults_file,
                **kept,
            )
        )
    packing = pack_prepared(recipe, prepared, max_length=max_length)
    room = int(world.all_reduce_min(_room(device, world)))
    loaded = load_for_ranks(recipe, source, objects, template=template, world=world, device=device)
    model = loaded.model
    longest = int(longest_paths(prepared.documents).max())
    if recipe.device.attention == "unpacked":
        model.run_unpacked()
    tested = test_loaded(loaded, world, max_length=longest)
    notes = [*prepared.notes, *model.notes, *tested.notes, *use_float8(recipe, model)]
    trained = choose_trained(recipe, model)
    kernels = choose_kernels(recipe, model, device)
    spared = sharded_savings(size, model, world, together=together)
    fit = choose_micro_batch(
        recipe,
        model,
        device,
        longest=-(-longest // world.cp.size),
        room=room + spared,
        held=size,
        probes=world.is_single,
    )
    steps = plan_steps(recipe, prepared, train, packing)
    order, total = steps.sampler, steps.total
    notes += steps.notes
    resolved = pin_revisions(
        resolve(recipe, model=model, source=source, trained=trained, max_length=max_length),
        train,
        held_out,
    )
    assert isinstance(resolved.optim.lr, float)
    model.train()
    work_model = model_work(model)
    loss = make_loss(
        recipe, model, order, total_steps=total, user_objective=own, group=world.model_parallel
    )
    reduce = parallelize(recipe, model, world, device, base=loss.frozen)
    compiled = compile_model(recipe, model, world, device, tokens=fit.tokens)
    shards = reduce.sharded
    optimizer = make_optimizer(
        resolved,
        model,
        None if shards is None else shards.parts,
        folder=faults_file and faults_file.parent,
    )
    optimizer.shards = shards
    job = Job(
        recipe=resolved,
        model=model,
        source=source,
        template=template,
        prepared=prepared,
        eval_sets=eval_sets,
        sampler=order,
        total_steps=total,
        lr=schedule(
            resolved.optim.schedule,
            lr=resolved.optim.lr,
            warmup_steps=warmup_steps(resolved.optim.warmup, total),
            total_steps=total,
            min_lr=resolved.optim.min_lr,
            decay=resolved.optim.decay,
        ),
        optimizer=optimizer,
        loss=loss,
        device=device,
        micro_tokens=fit.tokens,
        share_prefixes=_share(recipe, tested, model),
        trained_parameters=trained.trained,
        chosen={},
        user_objective=own,
        notes=notes,
        world=world,
        grad_sync=reduce,
        work=work_model,
    )
    job.chosen = {**_chosen(job, tested, fit), **computed_by(kernels, compiled)}
    said = objective_line(recipe, job.loss, shared=job.share_prefixes)
    said += [
        *adapter_lines(recipe, model, shared=job.share_prefixes),
        *computing_lines(kernels, compiled),
    ]
    spread = [
        *tensor_line(world, reduce),
        *context_line(world.cp.size, world.size, longest=longest),
        *idle_line(job, world.dp_size if world.is_main else 1, together=world.model_parallel.size),
    ]
    job.notes = [*spread, *said, *start_lines(job, trained), *notes]
    return job


def _room(device: torch.device, world: World) -> int:
    """Free bytes for this rank; on a CPU the ranks of a machine share its memory."""
    free = free_memory(device)
    return free // world.local_size if device.type == "cpu" else free


def resolve(
    recipe: Recipe,
    *,
    model: CausalLM,
    source: ModelSource | None,
    trained: AdapterReport,
    max_length: int,
) -> Recipe:
    """The recipe with every `auto` of its science sections as the value it became, fit to run
    anywhere.
    """
    dtype = str(next(model.base.parameters()).dtype).removeprefix("torch.")
    lr = recipe.optim.lr
    adapter = resolved_adapter(recipe, model, source)
    if lr == "auto":
        lr = auto_lr(adapter.get("kind", recipe.adapter.kind), trained.total)
    name = recipe.model.name
    if source is not None and Path(name).expanduser().exists():
        name = str(Path(name).expanduser().resolve())
    changes = {
        "model": {
            "name": name,
            "dtype": dtype,
            "revision": (source.commit if source else None) or recipe.model.revision,
        },
        "data": {"max_length": max_length},
        "optim": {"lr": lr},
        "objective": {"name": _objective_name(recipe)},
        "adapter": adapter,
    }
    parts = {key: getattr(recipe, key).model_copy(update=values) for key, values in changes.items()}
    return recipe.model_copy(update=parts)


def _objective_name(recipe: Recipe) -> str:
    """A function of the user's is found in the run's copy of its file."""
    name = recipe.objective.name
    return f"{COPY}:{name.rpartition(':')[2]}" if is_own(name) else name


def _share(recipe: Recipe, tested: SelfTest, model: CausalLM) -> bool:
    if recipe.device.share_prefixes != "auto":
        return recipe.device.share_prefixes
    return not (tested.noisy or noisy_adapter(model) or noisy_objective(recipe))


def _chosen(job: Job, tested: SelfTest, fit: MicroChoice) -> dict[str, Any]:
    return {
        "device": str(job.device),
        "dtype": job.recipe.model.dtype,
        "lr": job.recipe.optim.lr,
        "max_length": job.recipe.data.max_length,
        "micro_tokens": job.micro_tokens,
        "share_prefixes": job.share_prefixes,
        "attention": "unpacked" if job.model.unpacked else "sdpa",
        "gradient_checkpointing": fit.checkpointing,
        "memory": fit.reason,
        "activation_offload": job.model.offload,
        "total_steps": job.total_steps,
        "self_test": {"tolerance": tested.tolerance, **tested.differences},
    }
