"""From a recipe to a training job, in a few calls that each return a frozen value.

`build/` is the only room that sees both the recipe and the parts it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.build.adapter import choose_trained, noisy_adapter, resolved_adapter
from tunesmith.build.compile import compile_model
from tunesmith.build.data import Data, prepare_data
from tunesmith.build.deferred_model import TestedModel, load_tested
from tunesmith.build.device import choose_device, seed_everything
from tunesmith.build.inputs import UserObjects
from tunesmith.build.job import Choices, Job
from tunesmith.build.kernels import check_kernels, choose_kernels
from tunesmith.build.microbatch_size import choose_micro_batch
from tunesmith.build.model import FoundModel, find_model, resolve_source
from tunesmith.build.objective import make_loss, noisy_objective, user_objective
from tunesmith.build.optimizer import make_optimizer
from tunesmith.build.parallelize import make_groups, parallelize, ranks_per_copy, sharded_savings
from tunesmith.build.sampler import Steps, pin_revisions, plan_steps
from tunesmith.build.summary import resolved_choices, summary_lines
from tunesmith.config.compatibility import Facts, check_together
from tunesmith.config.schema import Recipe
from tunesmith.distributed.grad_sync import NoSync
from tunesmith.distributed.world import World
from tunesmith.model.adapters import AdapterReport, AdapterState
from tunesmith.model.kernels import Replaced, float8
from tunesmith.model.memory.activations import MicroChoice
from tunesmith.model.ops.malloc import keep_freed_memory
from tunesmith.optim import Optimizer, auto_lr, schedule, warmup_steps
from tunesmith.train.job import MicroBatching, RunData, Training
from tunesmith.train.loss import StepLoss
from tunesmith.train.microbatches import WorkModel, model_work
from tunesmith.train.user_objective import COPY, UserObjective, is_user_function

SINGLE_WORLD = World()


def build(
    recipe: Recipe,
    *,
    objects: UserObjects | None = None,
    folders: Sequence[Path] = (),
    faults_file: Path | None = None,
    world: World = SINGLE_WORLD,
) -> Job:
    """Everything a run needs, checked. All ranks of `world` build at the same time.

    `folders`: where data is searched for after the current folder. `faults_file`: where bad rows
    are written.

    Raises:
        InputError: what the recipe, the data or the model has wrong; nothing was trained.
    """
    objects = objects or UserObjects()
    device, world = open_world(recipe, objects, world)
    found, custom = check_inputs(recipe, objects, world, device, folders)
    data = prepare_data(
        recipe, objects, found.source, world, folders=folders, faults_file=faults_file
    )
    loaded = load_tested(recipe, found, objects, data, world, device)
    fitted = fit_to_device(recipe, found, loaded, data, world, device)
    steps = plan_steps(recipe, data.prepared, data.sources, data.packing)
    resolved = resolve(recipe, found, loaded, fitted, data)
    trained = make_trainables(resolved, loaded, fitted, steps, world, device, custom, faults_file)
    job = Job(
        data=RunData(data.template, data.prepared, data.eval_sets, steps.sampler),
        training=_training(resolved, found, loaded, fitted, steps, trained, world, device),
        choices=Choices(resolved, {}, custom),
        microbatching=MicroBatching(
            fitted.micro.tokens, _share_prefixes(recipe, loaded), trained.work
        ),
    )
    choices = resolved_choices(job, loaded.tested, fitted.micro, fitted.kernels, trained.compiled)
    notes = [*data.prepared.notes, *loaded.notes, *steps.notes]
    lines = summary_lines(
        job, fitted.report, choices, notes, longest=data.longest, frozen=loaded.frozen
    )
    return Job(job.data, job.training, Choices(resolved, choices, custom, lines), job.microbatching)


def open_world(recipe: Recipe, objects: UserObjects, world: World) -> tuple[torch.device, World]:
    """This rank's device, and the world with its model-parallel groups; seeds are set on the way.

    Raises:
        RecipeError: parts of the recipe that do not go together on this device.
    """
    device = world.device(choose_device(recipe))
    in_memory = objects.model is not None
    check_together(
        recipe,
        Facts(
            world.size, world.local_size, device.type,
            with_adapter=False if in_memory else None, in_memory=in_memory,
        ),
    )  # fmt: skip
    world = make_groups(recipe, world, device.type)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.train.seed)
    check_kernels(recipe)
    return device, world


def check_inputs(
    recipe: Recipe,
    objects: UserObjects,
    world: World,
    device: torch.device,
    folders: Sequence[Path],
) -> tuple[FoundModel, UserObjective | None]:
    """The model's files and the user's objective, before anything slow begins."""
    source = resolve_source(recipe, objects)
    if source is not None:
        # The table is asked a second time with what only the model's files tell. It was asked
        # before they were looked up, so that nothing is downloaded for a recipe that is refused.
        came = source.adapter_folder is not None
        check_together(recipe, Facts(world.size, world.local_size, device.type, with_adapter=came))
    if recipe.model.float8 != "none":
        float8.check_device(device)
    copies = ranks_per_copy(recipe, world)
    found = find_model(recipe, source, world, device, ranks_per_copy=copies)
    return found, user_objective(recipe, folders)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What is trained, by which kernels, and how much of it goes through the device at a time."""

    report: AdapterReport
    adapter: AdapterState
    kernels: Replaced | None
    micro: MicroChoice


def fit_to_device(
    recipe: Recipe,
    found: FoundModel,
    loaded: TestedModel,
    data: Data,
    world: World,
    device: torch.device,
) -> Fitted:
    """Attach the adapter, replace modules by kernels, and size the micro-batches."""
    model = loaded.model
    attached = choose_trained(recipe, model, loaded.adapter, loaded.unreached)
    kernels = choose_kernels(recipe, model, device)
    savings = sharded_savings(found.size, model, world, ranks_per_copy=found.ranks_per_copy)
    micro = choose_micro_batch(
        recipe,
        model,
        device,
        longest=-(-data.longest // world.cp.size),
        room=loaded.room + savings,
        held=found.size,
        probes=world.is_single,
    )
    return Fitted(attached.report, attached.state, kernels, micro)


@dataclass(frozen=True, slots=True)
class Trained:
    """What updates the model."""

    loss: StepLoss
    grad_sync: NoSync
    optimizer: Optimizer
    compiled: str | None
    work: WorkModel


def make_trainables(
    recipe: Recipe,
    loaded: TestedModel,
    fitted: Fitted,
    steps: Steps,
    world: World,
    device: torch.device,
    custom: UserObjective | None,
    faults_file: Path | None,
) -> Trained:
    """The loss, the model spread over the ranks, its compiled layers, and the optimizer.

    The work model is read before the model is sharded, since it counts parameters. The optimizer
    comes last: under FSDP it is made over this rank's shards.
    """
    model = loaded.model
    model.train()
    work = model_work(model)
    loss = make_loss(
        recipe, model, steps.sampler, adapter=fitted.adapter, total_steps=steps.total,
        user_objective=custom, group=world.model_parallel,
    )  # fmt: skip
    grad_sync = parallelize(recipe, model, world, device, base=loss.frozen, unread=loaded.unread)
    compiled = compile_model(recipe, model, world, device, tokens=fitted.micro.tokens)
    shards = grad_sync.sharded
    optimizer = make_optimizer(
        recipe, model, None if shards is None else shards.parts,
        folder=faults_file and faults_file.parent,
    )  # fmt: skip
    optimizer.shards = shards
    return Trained(loss, grad_sync, optimizer, compiled, work)


def _training(
    resolved: Recipe,
    found: FoundModel,
    loaded: TestedModel,
    fitted: Fitted,
    steps: Steps,
    trained: Trained,
    world: World,
    device: torch.device,
) -> Training:
    optim = resolved.optim
    assert isinstance(optim.lr, float)
    lr = schedule(
        optim.schedule, lr=optim.lr, warmup_steps=warmup_steps(optim.warmup, steps.total),
        total_steps=steps.total, min_lr=optim.min_lr, decay=optim.decay,
    )  # fmt: skip
    return Training(
        model=loaded.model,
        source=found.source,
        optimizer=trained.optimizer,
        loss=trained.loss,
        lr=lr,
        total_steps=steps.total,
        device=device,
        world=world,
        grad_sync=trained.grad_sync,
        trained_parameters=fitted.report.trained,
        adapter=fitted.adapter,
    )


def resolve(
    recipe: Recipe, found: FoundModel, loaded: TestedModel, fitted: Fitted, data: Data
) -> Recipe:
    """The recipe with every `auto` of its science sections as the value it became, and hub data
    pinned to its commit, so that it means the same anywhere.
    """
    model, source = loaded.model, found.source
    dtype = str(next(model.base.parameters()).dtype).removeprefix("torch.")
    lr = recipe.optim.lr
    adapter = resolved_adapter(recipe, model, fitted.adapter, source)
    if lr == "auto":
        lr = auto_lr(adapter.get("kind", recipe.adapter.kind), fitted.report.total)
    name = recipe.model.name
    if source is not None and Path(name).expanduser().exists():
        name = str(Path(name).expanduser().resolve())
    changes = {
        "model": {
            "name": name,
            "dtype": dtype,
            "revision": (source.commit if source else None) or recipe.model.revision,
        },
        "data": {"max_length": data.max_length},
        "optim": {"lr": lr},
        "objective": {"name": _objective_name(recipe)},
        "adapter": adapter,
    }
    parts = {key: getattr(recipe, key).model_copy(update=values) for key, values in changes.items()}
    return pin_revisions(recipe.model_copy(update=parts), data.sources, data.held_out)


def _objective_name(recipe: Recipe) -> str:
    """A function of the user's is found in the run's copy of its file."""
    name = recipe.objective.name
    return f"{COPY}:{name.rpartition(':')[2]}" if is_user_function(name) else name


def _share_prefixes(recipe: Recipe, loaded: TestedModel) -> bool:
    """`auto` shares unless random numbers are drawn per token: shared tokens would draw once."""
    if recipe.device.share_prefixes != "auto":
        return recipe.device.share_prefixes
    noisy = loaded.tested.noisy or noisy_adapter(loaded.model) or noisy_objective(recipe)
    return not noisy
