"""A cluster job: nodes, devices and the command of each node."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

PORT = 29400
GRACE = 120
"""Seconds between the signal to end and the end: a step and a checkpoint must fit."""
RESTARTS = 3
"""How often torchrun starts the ranks again on the same nodes, from the last checkpoint."""
RECIPE = "recipe.yaml"


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
