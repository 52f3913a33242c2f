"""`tunesmith bench`: measured speed of a run, its lower bound in time, and a profile of a step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.inputs import (
    Arguments,
    DataOption,
    ModelOption,
    folders_of,
    recipe_from_arguments,
)
from tunesmith.display import put

if TYPE_CHECKING:
    from tunesmith.bench import Bench


def bench(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Optimizer steps to time, evenly over the run.")
    ] = 5,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False,
) -> int:
    """Time a few real steps and discard their results; writes no run folder and no weights."""
    from tunesmith.bench import bench as measure

    recipe = recipe_from_arguments(arguments, model, data)
    found = measure(recipe, folders=folders_of(arguments), steps=steps)
    if as_json:
        put(json.dumps(found.record(), ensure_ascii=False, indent=1))
    else:
        put("\n".join(lines(found)))
    return 0


def lines(found: Bench) -> list[str]:
    """The report as lines of text."""
    rate, work = found.rate, found.work
    each = [step.seconds for step in found.steps]
    mean = found.seconds / len(each)
    shape = " by ".join(str(side) for side in rate.shape)
    memory = ", ".join(f"{name} {_bytes(size)}" for name, size in found.memory.items())
    total = sum(found.parts.values())
    page = [
        f"model: {found.trained:,} of {found.parameters:,} parameters trained, {found.dtype} on "
        f"{found.device} with {found.threads} threads, "
        f"micro-batches of up to {found.chosen['micro_tokens']} tokens",
        f"speed: {found.tokens_per_second:,.0f} tokens/s; a step takes {mean:.2f} s "
        f"({min(each):.2f} to {max(each):.2f}, {len(each)} steps)",
        f"floor: {found.floor_share:.0%} of a step's time is the floor, the time of its matrix "
        f"products alone: {sum(s.flops for s in found.steps) / len(each):.3g} operations, "
        f"{found.floor_seconds / len(each):.2f} s at the "
        f"{rate.flops_per_second / 1e9:,.0f} GFLOP/s measured here in {rate.dtype} ({shape})",
        f"memory: peak {_bytes(found.peak)}; {memory}",
        f"profile of one step ({total:.2f} s with the profiler on):",
    ]
    page += [
        f"  {name:<32} {seconds:8.2f} s {seconds / total:5.0%}"
        for name, seconds in found.parts.items()
    ]
    return [
        *page,
        f"padding avoided: {found.padding_avoided:,} tokens; {work.unshared:,} tokens of rows, "
        f"padded to the longest row of each step, would be {work.padded:,}",
        f"repeats avoided: {found.repeats_avoided:,} tokens; {work.computed:,} of "
        f"{work.unshared:,} are computed",
    ]


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
