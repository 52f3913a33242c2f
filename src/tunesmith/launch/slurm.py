"""Slurm sbatch script."""

from __future__ import annotations

import shlex

from tunesmith.launch.job import GRACE, PORT, RECIPE, LaunchJob, quoted, torchrun_words, train_words


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
