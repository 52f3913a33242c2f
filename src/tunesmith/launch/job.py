"""A cluster job: nodes, devices and the command of each node."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

import tunesmith

PORT = 29400
GRACE = 120
"""Seconds between the signal to end and the end: a step and a checkpoint must fit."""
RESTARTS = 3
"""How often torchrun starts the ranks again on the same nodes, from the last checkpoint."""
RECIPE = "recipe.yaml"
_RECIPES = "/etc/tunesmith"


@dataclass(frozen=True, slots=True)
class LaunchJob:
    """`recipe` is its YAML with every change; `folder` where paths of the recipe begin; `out` the
    run's folder, which every node and every attempt must see.
    """

    name: str  # of the job, as the cluster shows it
    recipe: str
    folder: str
    out: str
    nodes: int
    per_node: int  # devices
    hours: float | None = None
    image: str = ""  # of the container, Kubernetes
    claim: str = ""  # of the shared volume, Kubernetes
    mount: str = ""  # where that volume is seen
    accelerator: str = ""  # SkyPilot's name of the device


def job_name(text: str) -> str:
    """A name that every cluster takes: small letters, digits and single hyphens, up to 40."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}".strip("-")


def train_words(job: LaunchJob) -> tuple[list[str], list[str]]:
    """What a rank runs, before and after the recipe's path: it starts the run, or goes on with it
    where it has been started.
    """
    return ["-m", "tunesmith", "train"], ["--out", job.out, "--resume"]


def torchrun_words(job: LaunchJob) -> list[str]:
    """torchrun's own arguments, less the place where nodes meet."""
    return [
        "torchrun",
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.per_node}",
        f"--max-restarts={RESTARTS}",
        "--rdzv-backend=c10d",
    ]


def quoted(words: Sequence[str]) -> str:
    """The words for a shell, none of them more than a word."""
    return " ".join(shlex.quote(word) for word in words)


def k8s_files(job: LaunchJob) -> dict[str, str]:
    """The file by name. `kubectl apply -f job.yaml` starts the job.

    The pods find the first of them by the Service's name. A pod that is ended gets SIGTERM and time
    to save; one that fails is started again and goes on with the run on the shared volume.
    """
    objects = [_config(job), _service(job), _job(job)]
    return {"job.yaml": yaml.safe_dump_all(objects, sort_keys=False, allow_unicode=True)}


def _config(job: LaunchJob) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name},
        "data": {RECIPE: job.recipe},
    }


def _service(job: LaunchJob) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": job.name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"job-name": job.name},
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _job(job: LaunchJob) -> dict[str, Any]:
    limit = {} if job.hours is None else {"activeDeadlineSeconds": max(60, int(job.hours * 3600))}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": 20 * job.nodes,
            **limit,
            "template": {"metadata": {"labels": {"app": "tunesmith"}}, "spec": _pod(job)},
        },
    }


def _pod(job: LaunchJob) -> dict[str, Any]:
    before, after = train_words(job)
    rendezvous = [f"--rdzv-id={job.name}", f"--rdzv-endpoint={job.name}-0.{job.name}:{PORT}"]
    # A list of words, of which no shell reads any; `$(...)` is the one form that Kubernetes reads.
    words = [*torchrun_words(job), *rendezvous, *before, f"{_RECIPES}/{RECIPE}", *after]
    return {
        "subdomain": job.name,
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": GRACE,
        "containers": [
            {
                "name": "train",
                "image": job.image,
                "command": [word.replace("$(", "$$(") for word in words],
                "workingDir": job.folder,
                "resources": {"limits": {"nvidia.com/gpu": job.per_node}},
                "volumeMounts": [
                    {"name": "recipe", "mountPath": _RECIPES, "readOnly": True},
                    {"name": "shared", "mountPath": job.mount},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "recipe", "configMap": {"name": job.name}},
            {"name": "shared", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def slurm_files(job: LaunchJob) -> dict[str, str]:
    """The files by name. `sbatch job.sbatch`, from the folder they are in, starts the job.

    One torchrun a node meets at the first node of the allocation. Before the end of the time, and
    when the job must make room, Slurm sends SIGTERM to the script, which hands it on: the ranks
    save and end with 143, and the job is put back into the queue, where it goes on.
    """
    return {"job.sbatch": _script(job), RECIPE: job.recipe}


def _script(job: LaunchJob) -> str:
    time = "" if job.hours is None else f"#SBATCH --time={_time(job.hours)}\n"
    command = quoted(torchrun_words(job))
    before, after = train_words(job)
    train = f'{quoted(before)} "$here/{RECIPE}" {quoted(after)}'
    return f"""#!/bin/bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.per_node}
{time}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@{GRACE}
#SBATCH --output={job.name}-%j.log

set -uo pipefail
here="$SLURM_SUBMIT_DIR"
cd {shlex.quote(job.folder)} || exit 2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 {command} \\
  --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" --rdzv-endpoint="$first:{PORT}" \\
  {train} &
running=$!
ended=""
trap 'ended=1; kill -TERM "$running"' TERM

wait "$running"
code=$?
# A signal ends the first wait; the ranks are then still saving.
if [ -n "$ended" ]; then
  wait "$running"
  code=$?
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _time(hours: float) -> str:
    minutes = max(1, round(hours * 60))
    return f"{minutes // 60}:{minutes % 60:02d}:00"


def skypilot_files(job: LaunchJob) -> dict[str, str]:
    """The files by name. `sky jobs launch job.yaml`, from the folder they are in, starts the job.

    A managed job that loses its machines is started again on others and goes on with the run, as
    long as its folder is on storage that both see. Addresses of the nodes come from SkyPilot.
    """
    limit = [] if job.hours is None else ["timeout", "--signal=TERM", f"{job.hours:g}h"]
    before, after = train_words(job)
    command = quoted([*limit, *torchrun_words(job)])
    run = (
        "set -euo pipefail\n"
        'first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
        f"cd {quoted([job.folder])}\n"
        f'exec {command} --rdzv-id="$SKYPILOT_TASK_ID" --rdzv-endpoint="$first:{PORT}" \\\n'
        f'  {quoted(before)} "$HOME/tunesmith/{RECIPE}" {quoted(after)}\n'
    )
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "resources": {"accelerators": f"{job.accelerator}:{job.per_node}"},
        "file_mounts": {f"~/tunesmith/{RECIPE}": f"./{RECIPE}"},
        "setup": f"pip install 'tunesmith=={tunesmith.__version__}'\n",
        "run": run,
    }
    return {
        "job.yaml": yaml.safe_dump(task, sort_keys=False, allow_unicode=True, width=10_000),
        RECIPE: job.recipe,
    }
