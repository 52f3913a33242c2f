"""The lines a run starts with: what will be learned, from what, and what was chosen by itself."""

from __future__ import annotations

import json

import torch

from tunesmith.config.schema import Recipe
from tunesmith.data.preprocess.document_store import target_counts, token_counts
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.model.adapters import AdapterReport
from tunesmith.model.adapters.targets import expert_counts
from tunesmith.model.ops.packed_weight import quantized_share
from tunesmith.train.job import EvalSet, Job

FEW_STEPS = 50
SHOWN_CHARACTERS = 240


def start_lines(job: Job, trained: AdapterReport) -> list[str]:
    """What was decided, in a few lines, before the first step."""
    recipe, prepared = job.recipe, job.prepared
    tokens = int(token_counts(prepared.documents).sum())
    targets = int(target_counts(prepared.documents).sum())
    formats = ", ".join(f"{name}: {kind}" for name, kind in prepared.formats.items())
    lines = [
        f"data: {len(prepared.documents):,} documents, {tokens:,} tokens, "
        f"{targets:,} targets ({formats})",
        f"template: {job.template.name}; train_on {recipe.data.train_on}; "
        f"max_length {recipe.data.max_length}",
        f"first row: {_shortened(prepared.sample_text)}",
        f"model: {recipe.model.name}, {recipe.model.dtype} on {job.device} "
        f"with {torch.get_num_threads()} threads{_bits(job)}",
        f"trained: {trained}",
        f"steps: {job.total_steps} of {_batch(recipe)}, "
        f"{recipe.optim.name} lr {recipe.optim.lr:g} {recipe.optim.schedule}{_factors(recipe)}",
        f"device: {job.micro_tokens} tokens at a time, "
        f"prefixes {'shared' if job.share_prefixes else 'not shared'}, "
        f"{'one path at a time' if job.model.unpacked else 'packed'}; "
        f"gradient_checkpointing {job.chosen['gradient_checkpointing']}: {job.chosen['memory']}",
    ]
    lines += _loss_line(prepared.ledger)
    lines += [_eval_line(held) for held in job.eval_sets] or [
        "eval: no held-out data, so overfitting can't be seen; --eval 2% holds some rows out"
    ]
    if job.total_steps < FEW_STEPS:
        lines.append(
            f"only {job.total_steps} optimizer steps: "
            "a smaller batch.documents or more train.epochs gives more"
        )
    return lines


def _bits(job: Job) -> str:
    """How much of a quantised base is kept in fewer bits."""
    kind = job.recipe.model.quantization
    if kind == "none":
        return ""
    share = f"{quantized_share(job.model.base):.0%} of its weights kept as {kind}"
    if expert_counts(job.model.config):
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
