"""P3 over ranks: N ranks learn what one process learns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tunesmith.checkpoint.folder import load_checkpoint
from tunesmith.config.dump import to_yaml
from tunesmith.config.schema import Recipe
from tunesmith.config.sections.device import DeviceSection
from tunesmith.verify.outcome import Outcome, judged
from tunesmith.verify.workload import STEPS

NAME = "1 = N ranks"
COMPARED = {
    "rows.loss": "a row's loss",
    "spikes.loss": "a step's loss",
    "spikes.grad_norm": "a gradient norm",
}
"""What a checkpoint keeps of every step so far."""


def one_process() -> Outcome:
    """The line where only one process is asked for."""
    return Outcome(
        promise="P3",
        name=NAME,
        compared="losses and gradient norms of a short run on several ranks",
        oracle="the same run in one process",
        counts={},
        verdict="not checked",
        note="one process; --ranks 2 starts two",
    )


def for_ranks(recipe: Recipe, asked: DeviceSection, ranks: int) -> Recipe:
    """The recipe with model and sequences shared as `asked`, as far as so many ranks can."""
    shared = {
        "shard": "none" if asked.shard == "none" else "full",
        "context_parallel": 1 if ranks % asked.context_parallel else asked.context_parallel,
    }
    return recipe.model_copy(update={"device": recipe.device.model_copy(update=shared)})


def ranks_agree(
    recipe: Recipe, alone: Path, *, ranks: int, folders: Sequence[Path], precise: bool
) -> Outcome:
    """Train the short run `alone` once more under torchrun, and compare their last checkpoints."""
    place = alone.with_name(f"{alone.name}-ranks")
    file = alone.with_name("recipe.yaml")
    file.write_text(to_yaml(_found_anywhere(recipe, folders)), encoding="utf-8")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), "-m", "tunesmith", "train", str(file), "--out", str(place),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = dict(
        promise="P3", name=NAME,
        compared=f"losses of rows and gradient norms of {STEPS} steps on {ranks} ranks",
        oracle="the same run in one process", measure="relative",
    )  # fmt: skip
    tolerance = 1e-4 if precise else 8e-2
    if done.returncode != 0:
        last = [text for text in done.stderr.splitlines() if text.startswith("error:")]
        said = (last or done.stderr.splitlines()[-1:] or ["it said nothing"])[0]
        return Outcome(
            **line, counts={"ranks": ranks}, verdict="fails", difference=float("inf"),
            tolerance=tolerance, note=f"the run ended with {done.returncode}: {said[:200]}",
            advice="see that `torchrun -m tunesmith train` runs here; train on one rank until then",
        )  # fmt: skip
    one, many = (
        load_checkpoint(run / "checkpoints" / f"step-{STEPS}").model for run in (alone, place)
    )
    apart = {name: _apart(one[name], many[name]) for name in COMPARED}
    name, worst = max(apart.items(), key=lambda item: item[1])
    verdict = judged(worst, tolerance)
    return Outcome(
        **line,
        counts={"ranks": ranks, "rows": len(one["rows.loss"]), "steps": STEPS},
        difference=worst,
        tolerance=tolerance,
        verdict=verdict,
        note=f"largest in {COMPARED[name]}",
        advice="" if verdict == "holds" else "train on one rank, and report how the ranks are set",
    )


def _apart(one: Tensor, two: Tensor) -> float:
    if one.shape != two.shape:
        return float("inf")
    return float(((one - two).abs() / one.abs().clamp_min(1e-12)).max())


def _found_anywhere(recipe: Recipe, folders: Sequence[Path]) -> Recipe:
    """With the full paths of files that lie in one of `folders` or here."""
    sections = [
        section.model_copy(update={"path": _absolute(str(section.path), folders)})
        for section in recipe.data.train
    ]
    return recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"train": sections})}
    )  # fmt: skip


def _absolute(path: str, folders: Sequence[Path]) -> str:
    places = [Path.cwd(), *folders]
    return next((str((p / path).absolute()) for p in places if (p / path).exists()), path)
