"""The lines printed at the start of a run, and the record of what every `auto` became."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tunesmith.build.adapter import adapter_lines
from tunesmith.build.compile import computed_by, computing_lines
from tunesmith.build.context_parallel import context_line
from tunesmith.build.job import Job
from tunesmith.build.objective import objective_line
from tunesmith.build.rank_utilization import idle_line
from tunesmith.build.tensor_parallel import tensor_line
from tunesmith.config.schema import Recipe
from tunesmith.data.preprocess.document_store import target_counts, token_counts
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.model.adapters import AdapterReport
from tunesmith.model.adapters.targets import expert_counts
from tunesmith.model.kernels import Replaced
from tunesmith.model.memory.activations import MicroChoice
from tunesmith.model.ops.packed_weight import quantized_share
from tunesmith.model.selftest import SelfTest
from tunesmith.train.job import EvalSet

FEW_STEPS = 50
SHOWN_CHARACTERS = 240


def summary_lines(
    job: Job,
    report: AdapterReport,
    resolved: Mapping[str, Any],
    notes: Sequence[str],
    *,
    longest: int,
    frozen: Sequence[str] = (),
) -> list[str]:
    """All lines of a start; `resolved` is what every `auto` became, `notes` what the parts say, and
    `frozen` what no text reaches.
    """
    recipe, world, training = job.choices.recipe, job.training.world, job.training
    shared = job.microbatching.share_prefixes
    ranks = world.dp_size if world.is_main else 1
    together = world.model_parallel.size
    return [
        *tensor_line(world, training.grad_sync),
        *context_line(world.cp.size, world.size, longest=longest),
        *idle_line(job, ranks, together=together),
        *objective_line(recipe, training.loss, shared=shared),
        *adapter_lines(recipe, training.model, training.adapter, shared=shared),
        *computing_lines(resolved),
        *_start_lines(job, report, resolved, frozen),
        *notes,
    ]


def resolved_choices(
    job: Job,
    tested: SelfTest,
    micro: MicroChoice,
    kernels: Replaced | None,
    compiled: str | None,
) -> dict[str, Any]:
    """What every `auto` became, for machine.json."""
    recipe, training = job.choices.recipe, job.training
    return {
        "device": str(training.device),
        "dtype": recipe.model.dtype,
        "lr": recipe.optim.lr,
        "max_length": recipe.data.max_length,
        "micro_tokens": job.microbatching.micro_tokens,
        "share_prefixes": job.microbatching.share_prefixes,
        "attention": "unpacked" if training.model.unpacked else "sdpa",
        "gradient_checkpointing": micro.checkpointing,
        "memory": micro.reason,
        "activation_offload": training.loss.offload,
        "total_steps": training.total_steps,
        "self_test": {"tolerance": tested.tolerance, **tested.differences},
        **computed_by(kernels, compiled),
    }


def _start_lines(
    job: Job, trained: AdapterReport, resolved: Mapping[str, Any], frozen: Sequence[str]
) -> list[str]:
    """What was decided, in a few lines, before the first step."""
    recipe, prepared = job.choices.recipe, job.data.prepared
    tokens = int(token_counts(prepared.documents).sum())
    targets = int(target_counts(prepared.documents).sum())
    formats = ", ".join(f"{name}: {kind}" for name, kind in prepared.formats.items())
    lines = [
        f"data: {len(prepared.documents):,} documents, {tokens:,} tokens, "
        f"{targets:,} targets ({formats})",
        f"template: {job.data.template.name}; train_on {recipe.data.train_on}; "
        f"max_length {recipe.data.max_length}",
        f"first row: {_shortened(prepared.sample_text)}",
        f"model: {recipe.model.name}, {recipe.model.dtype} on {job.training.device} "
        f"with {torch.get_num_threads()} threads{_bits(job)}",
        f"trained: {trained}",
        *frozen,
        f"steps: {job.training.total_steps} of {_batch(recipe)}, "
        f"{recipe.optim.name} lr {recipe.optim.lr:g} {recipe.optim.schedule}{_factors(recipe)}",
        f"device: {job.microbatching.micro_tokens} tokens at a time, "
        f"prefixes {'shared' if job.microbatching.share_prefixes else 'not shared'}, "
        f"{'one path at a time' if job.training.model.unpacked else 'packed'}; "
        f"gradient_checkpointing {resolved['gradient_checkpointing']}: {resolved['memory']}",
    ]
    lines += _loss_line(prepared.ledger)
    lines += [_eval_line(held) for held in job.data.eval_sets] or [
        "eval: no held-out data, so overfitting can't be seen; --eval 2% holds some rows out"
    ]
    if job.training.total_steps < FEW_STEPS:
        lines.append(
            f"only {job.training.total_steps} optimizer steps: "
            "a smaller batch.documents or more train.epochs gives more"
        )
    return lines


def _bits(job: Job) -> str:
    """How much of a quantised base is kept in fewer bits."""
    kind = job.choices.recipe.model.quantization
    if kind == "none":
        return ""
    share = f"{quantized_share(job.training.model.base):.0%} of its weights kept as {kind}"
    if expert_counts(job.training.model.config):
        share += ", tensors of experts as they are"
    return f"; {share}"


def _factors(recipe: Recipe) -> str:
    """Factors of the learning rate, by group."""
    factors = recipe.optim.lr_factors
    return "".join(f", {group} times {factor:g}" for group, factor in factors.items())


def _loss_line(ledger: Ledger) -> list[str]:
    """What of the input is not learned from in full, if anything."""
    total = ledger.totals
    parts = [
        f"{count:,} {what}"
        for what, count in (
            ("rows dropped", total.rows_dropped),
            ("rows truncated", total.rows_truncated),
            ("tokens after the last answer unused", total.tokens_unused),
        )
        if count
    ]
    return [f"not learned: {', '.join(parts)}; ledger.json says why"] if parts else []


def _shortened(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[: SHOWN_CHARACTERS - 4]} ..."


def _batch(recipe: Recipe) -> str:
    what = "documents" if recipe.batch.packing == "none" else "packs"
    return (
        f"{recipe.batch.tokens} tokens"
        if recipe.batch.tokens
        else f"{recipe.batch.documents} {what}"
    )


def _eval_line(held: EvalSet) -> str:
    targets = int(target_counts(held.documents).sum())
    return f"eval: {held.name}, {len(held.documents):,} documents, {targets:,} targets"
