"""`tunesmith plan`: estimate of a run's memory and time, from a few measured steps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.inputs import (
    Arguments,
    DataOption,
    EvalOption,
    ModelOption,
    folders_of,
    recipe_from_arguments,
)
from tunesmith.display import put

if TYPE_CHECKING:
    from tunesmith.estimate import Forecast


def plan(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval: EvalOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False,
) -> int:
    """Estimate memory, time and work of a run from a few real steps, which are then discarded.

    Returns 0, or 1 if the run does not fit into memory.
    """
    from tunesmith.estimate import forecast

    recipe = recipe_from_arguments(arguments, model, data, eval)
    found = forecast(recipe, folders=folders_of(arguments))
    if as_json:
        put(json.dumps(found.record(), ensure_ascii=False, indent=1))
    else:
        put("\n".join(lines(found)))
    return 0 if found.fits else 1


def lines(found: Forecast) -> list[str]:
    """The report as lines of text."""
    work, seen = found.work, found.measured
    parts = ", ".join(f"{name} {_bytes(size)}" for name, size in found.memory.items())
    page = [
        f"trained: {found.trained:,} of {found.parameters:,} parameters "
        f"({found.trained / found.parameters:.2%})",
        f"memory: peak {_bytes(seen.peak)} of {_bytes(found.free)} free; {parts}",
        f"device: micro-batches of up to {found.chosen['micro_tokens']} tokens, "
        f"gradient_checkpointing={found.chosen['gradient_checkpointing']}",
        f"steps: {work.steps:,}; {work.tokens:,} tokens, {work.target_tokens:,} targets",
        f"computed: {work.computed:,} tokens; with a row for each answer it would be "
        f"{work.unshared:,}, and padded to the longest row of each step {work.padded:,}",
        f"work: {found.flops:.3g} floating point operations",
        f"time: {_time(found.seconds)} (steps {_time(found.train_seconds)}, evaluations "
        f"{_time(found.eval_seconds)}), from {seen.steps} steps measured on this machine; "
        "loading and saving are not included",
    ]
    if found.context:
        page.append(f"{found.context[0]}; memory is that of one rank")
    if work.grouped is not None and work.computed:
        page.append(
            f"batch.group_by_prefix=true would compute {work.grouped:,} tokens, "
            f"{1 - work.grouped / work.computed:.1%} fewer; it changes which documents share a "
            "step"
        )
    if found.packing is not None:
        from tunesmith.build.sampler import packing_line

        page.append(packing_line(found.packing))
    if work.counted < work.steps:
        page.append(
            f"counted: {work.counted} of {work.steps:,} steps, and scaled up to all of them"
        )
    if not found.fits:
        changes = ", ".join(found.would_fit) or "no change that is known here"
        page.append(f"the run does not fit into memory; it would fit with: {changes}")
    return page + [f"warning: {warning}" for warning in found.warnings]


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
