"""Run a recurrence over a prefix tree: each run begins at the final state of its parent.

Level by level, so that gradients flow back through the states as in one document alone. The inputs
of a padded step are chosen so that it leaves the state as it is: mostly zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tunesmith.model.recurrent.levels import LevelBatch, RunTree

State = tuple[Tensor, ...]
"""Tensors [S, ...]: what a recurrence carries from one token to the next."""

Recurrence = Callable[[Sequence[Tensor], State | None], tuple[Tensor, State]]
"""Takes its inputs [S, n, ...] and the initial state; returns outputs [S, n, ...] and the final
state.
"""


def run_over_tree(
    tree: RunTree,
    recurrence: Recurrence,
    inputs: Sequence[Tensor],
    *,
    padding: Sequence[float] | None = None,
) -> Tensor:
    """The outputs [T, ...] of a recurrence over all runs.

    `inputs` are [T, ...]; `padding` is what each of them is in a padded step, by default 0.
    """
    if tree.single:
        return recurrence([each[None] for each in inputs], None)[0][0]
    fills = [0.0] * len(inputs) if padding is None else padding
    padded = [
        torch.cat([each, each.new_full((1, *each.shape[1:]), fill)])
        for each, fill in zip(inputs, fills, strict=True)
    ]
    states: dict[int, State] = {}
    needed = {run.parent for run in tree.runs}
    outputs: list[Tensor] = []
    for batch in tree.batches:
        output, final = recurrence(
            [_gathered(each, batch) for each in padded], _initial(states, batch)
        )
        outputs.append(output.flatten(0, 1).index_select(0, batch.real))
        rows = zip(*(part.unbind(0) for part in final), strict=True)
        states |= {n: row for n, row in zip(batch.runs, rows, strict=True) if n in needed}
    return torch.cat(outputs).index_select(0, tree.inverse)


def _gathered(padded: Tensor, batch: LevelBatch) -> Tensor:
    # index_select: the backward pass of indexing would sum the padding in random order
    found = padded.index_select(0, batch.tokens)
    return found.view(len(batch.runs), batch.steps, *padded.shape[1:])


def _initial(states: dict[int, State], batch: LevelBatch) -> State | None:
    if not batch.parents:
        return None
    parts = zip(*(states[parent] for parent in batch.parents), strict=True)
    return tuple(torch.stack(part) for part in parts)
