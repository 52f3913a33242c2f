"""From a recipe to the objects of a run. The only place that sees both the recipe and the parts it
is about.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.config.schema import Holdout, Recipe
from tunesmith.data.loader import StepOrder
from tunesmith.data.prepare import Prepared
from tunesmith.data.sources import Source
from tunesmith.data.template import Template, load_template, wrap_tokenizer
from tunesmith.errors import InputError, ModelError
from tunesmith.model.adapters import AdapterReport, add_lora, full_report
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import choose_dtype, load_causal_lm, resolve_model, wrap_causal_lm
from tunesmith.model.memory import (
    MemoryEstimate,
    check_fits,
    free_memory,
    measure,
)
from tunesmith.model.selftest import SelfTest, self_test
from tunesmith.model.source import ModelSource
from tunesmith.objectives import OBJECTIVES, head_loss
from tunesmith.optim import AdamW, auto_lr, schedule, undecayed, warmup_steps
from tunesmith.train.announcement import start_lines
from tunesmith.train.device import (
    choose_device,
    fit_device,
    keep_freed_memory,
    seed_everything,
)
from tunesmith.train.job import Job
from tunesmith.train.sources import Rows, make_sources, memory_source, prepare_all


@dataclass(slots=True)
class Given:
    """Objects the caller brought instead of naming them in the recipe."""

    model: Any = None  # a transformers or peft model
    tokenizer: Any = None
    rows: Rows | None = None
    eval_rows: Rows | None = None


def build(
    recipe: Recipe,
    *,
    given: Given | None = None,
    folders: Sequence[Path] = (),
    faults_file: Path | None = None,
) -> Job:
    """Everything a run needs, checked. `folders`: where data is looked for after the current
    folder.

    Raises:
        InputError: what the recipe, the data or the model has wrong; nothing was trained.
    """
    given = given or Given()
    device = choose_device(recipe)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(recipe.train.seed)
    notes: list[str] = []
    source = (
        None
        if given.model is not None
        else resolve_model(recipe.model.name, revision=recipe.model.revision)
    )
    size = _check_memory(recipe, source, device)
    template = open_template(recipe, source, given)
    max_length = resolve_max_length(recipe, template)
    train, held_out = _data_sources(recipe, given, folders)
    prepared, eval_sets = prepare_all(
        train, held_out, template, recipe.data, max_length=max_length, faults_file=faults_file
    )
    room = free_memory(device)
    model = _load(recipe, source, given, device)
    notes += model.notes
    longest = max(document.longest_path for document in prepared.documents)
    if recipe.device.attention == "isolated":
        model.isolate()
    tested = self_test(model, max_length=longest)
    notes += tested.notes
    trained = _choose_trained(recipe, model)
    micro_tokens, checkpointing = fit_device(
        recipe, model, device, longest=longest, room=room, held=size
    )
    order = make_order(recipe, prepared)
    total = recipe.train.steps or order.total_steps(recipe.train.epochs or 3)
    resolved = resolve(recipe, model=model, source=source, trained=trained, max_length=max_length)
    assert isinstance(resolved.optim.lr, float)
    model.train()
    job = Job(
        recipe=resolved,
        model=model,
        source=source,
        template=template,
        prepared=prepared,
        eval_sets=eval_sets,
        order=order,
        total_steps=total,
        lr=schedule(
            resolved.optim.schedule,
            lr=resolved.optim.lr,
            warmup_steps=warmup_steps(resolved.optim.warmup, total),
            total_steps=total,
        ),
        optimizer=_make_optimizer(resolved, model),
        head_loss=functools.partial(head_loss, objective=OBJECTIVES[recipe.objective.name]),
        device=device,
        micro_tokens=micro_tokens,
        share=_share(recipe, tested),
        trained_parameters=trained.trained,
        chosen={},
        notes=notes,
    )
    job.chosen = _chosen(job, tested, checkpointing)
    job.notes = [*start_lines(job, trained), *notes]
    return job


def open_template(recipe: Recipe, source: ModelSource | None, given: Given) -> Template:
    """The tokenizer with the chat template that the recipe asks for."""
    options: dict[str, Any] = {
        "template": recipe.data.template,
        "kwargs": recipe.data.template_kwargs,
    }
    if given.tokenizer is not None:
        return wrap_tokenizer(given.tokenizer, **options)
    if source is None:
        raise InputError(
            "a model given as an object needs its tokenizer",
            where="tokenizer",
            hint="tokenizer=...",
        )
    return load_template(
        source.tokenizer_folder, trust_remote_code=recipe.model.trust_remote_code, **options
    )


def resolve_max_length(recipe: Recipe, template: Template) -> int:
    """`data.max_length`, with `auto` as the model's context.

    Raises:
        ModelError: auto, and the model names no context.
    """
    if recipe.data.max_length != "auto":
        return recipe.data.max_length
    if template.context_length is None:
        raise ModelError(
            "the model names no context length",
            where="data.max_length",
            hint="data.max_length=2048",
        )
    return template.context_length


def make_order(recipe: Recipe, prepared: Prepared) -> StepOrder:
    """Which documents each step learns from."""
    return StepOrder(
        [document.tokens for document in prepared.documents],
        documents=None if recipe.batch.tokens else recipe.batch.documents,
        tokens=recipe.batch.tokens,
        seed=recipe.train.seed,
        shuffle=recipe.data.shuffle,
    )


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
    if lr == "auto":
        lr = auto_lr(recipe.adapter.kind, trained.total)
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
    }
    parts = {key: getattr(recipe, key).model_copy(update=values) for key, values in changes.items()}
    return recipe.model_copy(update=parts)


def _data_sources(
    recipe: Recipe, given: Given, folders: Sequence[Path]
) -> tuple[list[Source], dict[str, list[Source]] | Holdout | None]:
    data = recipe.data
    if given.rows is not None:
        train = memory_source(given.rows, data, name="<data>")
    else:
        train = make_sources(data.train, data, folders=folders)
    if given.eval_rows is not None:
        return train, {"eval": memory_source(given.eval_rows, data, name="<eval>")}
    if isinstance(data.eval, dict):
        return train, {
            name: make_sources(s, data, folders=folders) for name, s in data.eval.items()
        }
    return train, data.eval


def _check_memory(
    recipe: Recipe, source: ModelSource | None, device: torch.device
) -> MemoryEstimate | None:
    if source is None:
        return None
    return check_fits(
        measure(source, trust_remote_code=recipe.model.trust_remote_code),
        dtype=choose_dtype(recipe.model.dtype, device).dtype,
        rank=recipe.adapter.rank if recipe.adapter.kind == "lora" else None,
        free=free_memory(device),
        name=recipe.model.name,
    )


def _load(
    recipe: Recipe, source: ModelSource | None, given: Given, device: torch.device
) -> CausalLM:
    if source is None:
        return wrap_causal_lm(given.model.to(device))
    return load_causal_lm(
        source,
        dtype=recipe.model.dtype,
        device=device,
        trust_remote_code=recipe.model.trust_remote_code,
    )


def _choose_trained(recipe: Recipe, model: CausalLM) -> AdapterReport:
    adapter = recipe.adapter
    if adapter.kind == "lora":
        report = add_lora(
            model,
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            targets=adapter.targets,
        )
    else:
        report = full_report(model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32  # micro-batches are added up in float32
    return report


def _make_optimizer(recipe: Recipe, model: CausalLM) -> AdamW:
    optim = recipe.optim
    return AdamW(
        model.named_parameters(),
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        undecayed=undecayed(model),
    )


def _share(recipe: Recipe, tested: SelfTest) -> bool:
    if recipe.device.share_prefixes != "auto":
        return recipe.device.share_prefixes
    return not tested.noisy and recipe.adapter.dropout == 0


def _chosen(job: Job, tested: SelfTest, checkpointing: bool) -> dict[str, Any]:
    return {
        "device": str(job.device),
        "dtype": job.recipe.model.dtype,
        "lr": job.recipe.optim.lr,
        "max_length": job.recipe.data.max_length,
        "micro_tokens": job.micro_tokens,
        "share_prefixes": job.share,
        "attention": "isolated" if job.model.isolated else "sdpa",
        "gradient_checkpointing": checkpointing,
        "total_steps": job.total_steps,
        "self_test": {"tolerance": tested.tolerance, **tested.differences},
    }
