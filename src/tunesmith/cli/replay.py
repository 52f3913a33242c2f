"""`tunesmith replay`: repeat one training step of a run and show the loss of each document."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.display import put

if TYPE_CHECKING:
    from tunesmith.replay import Replay


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder.")],
    step: Annotated[int, typer.Option("--step", min=1, help="Number of the step, from 1.")],
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Also show the gradient norm of each document.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
    ] = False,
) -> int:
    """Repeat a step of a run, bit for bit, from the nearest checkpoint before it.

    Returns 0. Returns 1 if the numbers differ from those of the run, although versions, threads and
    everything else that they depend on are the same.
    """
    from tunesmith.replay import replay as replay_step

    found = replay_step(
        Path(run),
        step,
        gradients=gradients,
        on_status=lambda text: put(text, file=sys.stderr, flush=True),
    )
    if as_json:
        put(json.dumps(found.record(), ensure_ascii=False, indent=1))
    else:
        put("\n".join(lines(found)))
    return 1 if found.equal is False and not found.unlike else 0


def lines(found: Replay) -> list[str]:
    """The report: the step's numbers, whether they equal the run's, and its documents."""
    page = [*found.notes, f"step {found.step}: {_numbers(found)}", _comparison(found)]
    page.append(_line(found, ["loss", "weight", "targets", "tokens", "grad norm"], "row"))
    for entry in found.documents:
        values = [entry["loss"], entry["weight"], entry["targets"], entry["tokens"]]
        page.append(_line(found, [*values, entry.get("grad_norm", "")], entry["row"]))
    return page


def _line(found: Replay, values: Sequence[float | str], row: str) -> str:
    """A row of the table; the gradient norm, which is last, only if it was computed."""
    width = max(len(str(entry["row"])) for entry in found.documents)
    shown = [value if isinstance(value, str) else f"{value:.6g}" for value in values]
    shown = shown if "grad_norm" in found.documents[0] else shown[:-1]
    return f"{row:<{width}}" + "".join(f"  {text:>9}" for text in shown)


def _numbers(found: Replay) -> str:
    now = found.now
    return (
        f"loss {now['loss']}, gradient norm {now['grad_norm']}, lr {now['lr']:.6g}, "
        f"{now['target_tokens']} targets, {now['computed_tokens']} tokens computed"
    )


def _comparison(found: Replay) -> str:
    if found.then is None:
        return "metrics.jsonl has no record of this step, so there is nothing to compare with"
    if found.equal:
        return "equal to metrics.jsonl to the bit"
    differ = [
        f"{name} is {found.now[name]} and was {then}"
        for name, then in found.then.items()
        if found.now[name] != then
    ]
    why = "; ".join(found.unlike) or "no difference is known that would explain it"
    return f"NOT equal to metrics.jsonl: {'; '.join(differ)} ({why})"
