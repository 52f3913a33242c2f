"""`tunesmith launch`: the files that start a run on a cluster."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.inputs import Arguments, DataOption, EvalOption, ModelOption
from tunesmith.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from tunesmith.config.schema import Recipe
    from tunesmith.launch.job import LaunchJob

_GIB = 1 << 30


def launch(
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval: EvalOption = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="A batch script for sbatch.")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="Objects for kubectl apply.")] = False,
    skypilot: Annotated[bool, typer.Option("--skypilot", help="A task for sky launch.")] = False,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines; as many as the job needs by default.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Devices in each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=1, help="GiB of each device.")] = 80.0,
    gpu: Annotated[str, typer.Option(help="SkyPilot's name of the device.")] = "H100",
    hours: Annotated[float | None, typer.Option(min=0.02, help="Longest time of the job.")] = None,
    image: Annotated[str, typer.Option(help="Kubernetes: container with Tunesmith in it.")] = "",
    claim: Annotated[str, typer.Option(help="Kubernetes: claim of the shared volume.")] = "",
    mount: Annotated[str, typer.Option(help="Kubernetes: where that volume is seen.")] = "",
    out: Annotated[str | None, typer.Option(help="The run's folder, on shared storage.")] = None,
    to: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("launch"),
    write: Annotated[
        bool, typer.Option("--write", help="Write them; else they are shown.")
    ] = False,
) -> None:
    """Write the files that start a run on Slurm, Kubernetes or SkyPilot; starts nothing.

    Shows them and what they need unless `--write` is given. The job starts the run or, after it was
    ended or its machines were lost, goes on with it.
    """
    from tunesmith.cli.inputs import recipe_from_arguments
    from tunesmith.config.dump import to_yaml
    from tunesmith.launch.job import LaunchJob, job_name
    from tunesmith.redact import redact

    kind = _kind(slurm, k8s, skypilot)
    recipe = recipe_from_arguments(arguments, model, data, eval)
    count, lines = _nodes(recipe, nodes, gpus_per_node, int(gpu_memory * _GIB))
    folder = Path.cwd()
    run = (folder / (out or f"runs/{job_name(Path(recipe.model.name).name)}")).absolute()
    job = LaunchJob(
        name=job_name(f"tunesmith-{run.name}"),
        recipe=to_yaml(recipe),
        folder=str(folder),
        out=str(run),
        nodes=count,
        per_node=gpus_per_node,
        hours=hours,
        image=image,
        claim=claim,
        mount=mount or str(run.parent),
        accelerator=gpu,
    )
    files = _files(kind, job)
    for line in [*lines, *_notes(recipe, job)]:
        print(redact(line), file=sys.stderr)
    _give(files, to, write=write)


def _kind(slurm: bool, k8s: bool, skypilot: bool) -> str:
    chosen = [n for n, yes in (("slurm", slurm), ("k8s", k8s), ("skypilot", skypilot)) if yes]
    if len(chosen) != 1:
        raise RecipeError(
            "one kind of cluster must be named", hint="give --slurm, --k8s or --skypilot"
        )
    return chosen[0]


def _nodes(recipe: Recipe, asked: int | None, per_node: int, memory: int) -> tuple[int, list[str]]:
    """How many machines, and what was computed about it; their devices are whole groups of those
    that share a sequence.
    """
    from tunesmith.launch.need import devices_needed

    together = recipe.device.context_parallel * recipe.device.tensor_parallel
    if asked is not None and asked * per_node % together:
        raise RecipeError(
            f"{asked} x {per_node} devices can't be divided into groups of {together}",
            where="device.context_parallel"
            if recipe.device.context_parallel > 1
            else "device.tensor_parallel",
            hint=f"--nodes {_whole_groups(asked, per_node, together)}",
        )
    try:
        need = devices_needed(recipe, memory=memory, per_node=per_node)
    except ModelError as error:
        if asked is None:
            raise ModelError(
                f"how many devices it needs can't be computed: {error.message}",
                where=error.where,
                hint="give --nodes, or run this where the model is",
            ) from error
        return asked, [f"needs: can't be computed here, since the model: {error.message}"]
    least = _whole_groups(math.ceil(need.devices / per_node), per_node, together)
    count = least if asked is None else asked
    lines = [f"needs: {need.line()}"]
    if count < least:
        raise RecipeError(
            f"{count} x {per_node} devices do not hold it; it needs {need.devices} or more",
            where="--nodes",
            hint=f"--nodes {least}; or devices with more memory: --gpu-memory GIB",
        )
    held = need.on(count * per_node, per_node=per_node) / _GIB
    lines.append(f"chosen: {count} x {per_node} devices, about {held:.1f} GiB on each")
    return count, lines


def _whole_groups(nodes: int, per_node: int, together: int) -> int:
    """The least number of machines from `nodes` on whose devices make whole groups."""
    step = together // math.gcd(together, per_node)
    return -(-nodes // step) * step


def _files(kind: str, job: LaunchJob) -> dict[str, str]:
    from tunesmith.launch.job import k8s_files, skypilot_files, slurm_files

    if kind == "k8s":
        missing = [n for n, value in (("--image", job.image), ("--claim", job.claim)) if not value]
        if missing:
            raise RecipeError(
                f"Kubernetes needs {' and '.join(missing)}",
                hint="--image NAME:TAG is a container with Tunesmith, --claim the volume that "
                "keeps the run",
            )
        return k8s_files(job)
    return {"slurm": slurm_files, "skypilot": skypilot_files}[kind](job)


def _notes(recipe: Recipe, job: LaunchJob) -> list[str]:
    paths = [recipe.model.name, *(section.path for section in recipe.data.train if section.path)]
    seen = ", ".join(str(path) for path in paths)
    return [
        f"every node must see: {seen} (from {job.folder}), and the run's folder {job.out}",
        "secrets such as HF_TOKEN come from the cluster's own environment, never from these files",
    ]


def _give(files: dict[str, str], folder: Path, *, write: bool) -> None:
    if not write:
        for name, content in files.items():
            print(f"# --- {folder / name}\n{content}")
        print("nothing was written; --write writes these files", file=sys.stderr)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
            print(folder / name)
    except OSError as error:
        raise RecipeError(
            f"can't be written: {error.strerror or error}", where=str(folder), hint="give --to DIR"
        ) from error
