"""The training loss of the recipe: objective, regularizers, reference model, NEFTune, MoE
balance.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from tunesmith.config.schema import Recipe
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.distributed.model_parallel_group import ModelParallelGroup
from tunesmith.errors import RecipeError
from tunesmith.model.adapters.state import AdapterState
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.moe_router import Routers
from tunesmith.model.neftune import EmbeddingNoise
from tunesmith.objectives import Objective, named_objective, nll, with_terms
from tunesmith.train.loss import ReferenceModel, RouterBalance, StepLoss
from tunesmith.train.old_policy import OldPolicy
from tunesmith.train.user_objective import UserObjective, is_user_function, load_objective

NO_GROUP = ModelParallelGroup()
OBJECTIVE_OPTIONS = ("alpha", "eps_low", "eps_high")
CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "eva_")
"""Beginnings of adapter initialisations that take something out of the weights they go on."""


def user_objective(recipe: Recipe, folders: Sequence[Path]) -> UserObjective | None:
    """The user's function, where the recipe names one."""
    name = recipe.objective.name
    return load_objective(name, folders) if is_user_function(name) else None


def noisy_objective(recipe: Recipe) -> bool:
    """True where the objective draws random numbers, so that layouts agree in distribution only."""
    return recipe.objective.neftune > 0 or recipe.objective.scheduled_sampling > 0


def make_loss(
    recipe: Recipe,
    model: CausalLM,
    sampler: BatchSampler,
    *,
    adapter: AdapterState,
    total_steps: int,
    user_objective: UserObjective | None,
    group: ModelParallelGroup = NO_GROUP,
) -> StepLoss:
    """The loss of the recipe; `total_steps` of the whole run, `sharers` of each micro-batch."""
    section = recipe.objective
    return StepLoss(
        objective=_with_terms(recipe, _user_loss(recipe, user_objective)),
        steps=total_steps,
        warmup=_with_terms(recipe, nll),
        reference=_reference_model(model, adapter) if section.kl else None,
        old_policy=_old_policy(recipe, sampler),
        sampling=section.scheduled_sampling,
        noise=EmbeddingNoise(model, section.neftune) if section.neftune else None,
        balance=RouterBalance(Routers(model), section.router_aux) if section.router_aux else None,
        group=group,
        offload=recipe.device.activation_offload,
    )


def objective_line(recipe: Recipe, loss: StepLoss, *, shared: bool) -> list[str]:
    """What a start says about the objective, in one line; nothing about plain nll."""
    section = recipe.objective
    given = {
        key: value
        for key in type(section).model_fields
        if key != "name" and (value := getattr(section, key))
    }
    if section.name == "nll" and not given:
        return []
    parts = [f"objective: {section.name}", *(f"{key} {value:g}" for key, value in given.items())]
    text = ", ".join(parts)
    if loss.reference is not None:
        base = "the model without its adapter"
        if loss.reference.frozen is not None:
            held = sum(p.numel() * p.element_size() for p in loss.reference.frozen.parameters())
            base = f"a frozen copy of the model, {held / 2**30:.2f} GiB"
        text += f"; the base is {base}"
    if noisy_objective(recipe):
        state = "shared, as asked" if shared else "not shared"
        text += f"; with noise layouts agree in expectation only, prefixes are {state}"
    return [text]


def _user_loss(recipe: Recipe, user_objective: UserObjective | None) -> Objective:
    if user_objective is not None:
        return user_objective.function
    section = recipe.objective
    options = {
        key: value for key in OBJECTIVE_OPTIONS if (value := getattr(section, key)) is not None
    }
    return named_objective(section.name, smoothing=section.label_smoothing or 0.0, **options)


def _with_terms(recipe: Recipe, loss: Objective) -> Objective:
    section = recipe.objective
    return with_terms(loss, z_weight=section.z_loss, entropy=section.entropy, kl=section.kl or 0.0)


def _old_policy(recipe: Recipe, sampler: BatchSampler) -> OldPolicy | None:
    section = recipe.objective
    if section.name != "psft":
        return None
    warmup = section.warmup_epochs or 0.0
    return OldPolicy(
        first=sampler.total_steps(warmup) if warmup else 0, steps=section.outer_steps or 8
    )


def _reference_model(model: CausalLM, adapter: AdapterState) -> ReferenceModel:
    """Without its adapter a model is its base, if the adapter left the weights below it alone."""
    if not hasattr(model.model, "peft_config"):
        frozen = copy.deepcopy(model).eval()
        return ReferenceModel(frozen.requires_grad_(False))
    config = model.model.peft_config[model.model.active_adapter]
    start = "loftq" if adapter.of_quantized else getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise RecipeError(
            f"an adapter that begins as {start} changes the weights below it, so the base model is "
            "no longer there to be held near",
            where="objective.kl",
            hint="another initialisation of the adapter, or full fine-tuning",
        )
    return ReferenceModel(None)
