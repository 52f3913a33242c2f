"""`tunesmith launch`: job files that start a run under Slurm, Kubernetes or SkyPilot."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.inputs import Arguments, DataOption, EvalOption, ModelOption
from tunesmith.display import put
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
    slurm: Annotated[bool, typer.Option("--slurm", help="Make a batch script for sbatch.")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="Make manifests for kubectl apply.")] = False,
    skypilot: Annotated[
        bool, typer.Option("--skypilot", help="Make a task file for sky jobs launch.")
    ] = False,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Number of nodes. By default as many as needed.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Number of GPUs in a node.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of a GPU in GiB.")] = 80.0,
    gpu: Annotated[str, typer.Option(help="SkyPilot: name of the GPU.")] = "H100",
    hours: Annotated[float | None, typer.Option(min=0.02, help="Time limit in hours.")] = None,
    image: Annotated[str, typer.Option(help="Kubernetes: container image with Tunesmith.")] = "",
    claim: Annotated[str, typer.Option(help="Kubernetes: claim of the shared volume.")] = "",
    mount: Annotated[str, typer.Option(help="Kubernetes: mount path of that volume.")] = "",
    out: Annotated[str | None, typer.Option(help="Run folder, on shared storage.")] = None,
    to: Annotated[Path, typer.Option(help="Folder for the job files.")] = Path("launch"),
    write: Annotated[
        bool, typer.Option("--write", help="Write the files. Without it they are printed.")
    ] = False,
) -> None:
    """Make the job files that start a run under Slurm, Kubernetes or SkyPilot; starts nothing.

    Without `--write` the files and the memory that they need are printed. The job starts the run.
    If the job is started again, after an interruption or a lost machine, it resumes the run.
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
        put(redact(line), file=sys.stderr)
    _give(files, to, write=write)


def _kind(slurm: bool, k8s: bool, skypilot: bool) -> str:
    chosen = [n for n, yes in (("slurm", slurm), ("k8s", k8s), ("skypilot", skypilot)) if yes]
    if len(chosen) != 1:
        raise RecipeError(
            "give exactly one kind of cluster", hint="give --slurm, --k8s or --skypilot"
        )
    return chosen[0]


def _nodes(
    recipe: Recipe, requested: int | None, per_node: int, memory: int
) -> tuple[int, list[str]]:
    """The number of nodes, and lines on how it was computed.

    All devices together make whole model-parallel groups (context times tensor parallelism).
    """
    from tunesmith.launch.need import devices_needed

    group = recipe.device.context_parallel * recipe.device.tensor_parallel
    if requested is not None and requested * per_node % group:
        raise RecipeError(
            f"{requested} x {per_node} devices can't be divided into groups of {group}",
            where="device.context_parallel"
            if recipe.device.context_parallel > 1
            else "device.tensor_parallel",
            hint=f"--nodes {_whole_groups(requested, per_node, group)}",
        )
    try:
        need = devices_needed(recipe, memory=memory, per_node=per_node)
    except ModelError as error:
        if requested is None:
            raise ModelError(
                f"the number of devices can't be computed: {error.message}",
                where=error.where,
                hint="give --nodes, or run this where the model is",
            ) from error
        return requested, [f"needs: can't be computed here: {error.message}"]
    least = _whole_groups(math.ceil(need.devices / per_node), per_node, group)
    count = least if requested is None else requested
    lines = [f"needs: {need.line()}"]
    if count < least:
        raise RecipeError(
            f"the run does not fit on {count} x {per_node} devices; it needs at least "
            f"{need.devices}",
            where="--nodes",
            hint=f"--nodes {least}; or devices with more memory: --gpu-memory GIB",
        )
    held = need.on(count * per_node, per_node=per_node) / _GIB
    lines.append(f"chosen: {count} x {per_node} devices, about {held:.1f} GiB used on each")
    return count, lines


def _whole_groups(nodes: int, per_node: int, group: int) -> int:
    """The smallest number of nodes, at least `nodes`, whose devices make whole groups."""
    step = group // math.gcd(group, per_node)
    return -(-nodes // step) * step


def _files(kind: str, job: LaunchJob) -> dict[str, str]:
    from tunesmith.launch.job import k8s_files, skypilot_files, slurm_files

    if kind == "k8s":
        missing = [n for n, value in (("--image", job.image), ("--claim", job.claim)) if not value]
        if missing:
            raise RecipeError(
                f"Kubernetes needs {' and '.join(missing)}",
                hint="--image NAME:TAG is a container image with Tunesmith, --claim is the volume "
                "claim for the run folder",
            )
        return k8s_files(job)
    return {"slurm": slurm_files, "skypilot": skypilot_files}[kind](job)


def _notes(recipe: Recipe, job: LaunchJob) -> list[str]:
    paths = [recipe.model.name, *(section.path for section in recipe.data.train if section.path)]
    seen = ", ".join(str(path) for path in paths)
    return [
        f"every node must be able to read {seen} (from {job.folder}) and to write {job.out}",
        "secrets such as HF_TOKEN must come from the cluster's environment; no file holds them",
    ]


def _give(files: dict[str, str], folder: Path, *, write: bool) -> None:
    if not write:
        for name, content in files.items():
            put(f"# --- {folder / name}\n{content}")
        put("nothing was written; add --write to write these files", file=sys.stderr)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
            put(folder / name)
    except OSError as error:
        raise RecipeError(
            f"can't be written: {error.strerror or error}", where=str(folder), hint="give --to DIR"
        ) from error
