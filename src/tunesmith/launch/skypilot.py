"""SkyPilot task file."""

from __future__ import annotations

from typing import Any

import yaml

import tunesmith
from tunesmith.launch.job import PORT, RECIPE, LaunchJob, quoted, torchrun_words, train_words


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
