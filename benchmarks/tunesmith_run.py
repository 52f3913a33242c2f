"""One run of Tunesmith, timed like trl_run.py; vs_trl.py starts it in its own process.

    python benchmarks/tunesmith_run.py '{"model": M, "rows": F, "documents": 8, "lr": 1e-4,
                                         "warmup": 1, "seed": 42, "threads": 2}'

The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from peak import peak_memory

import tunesmith


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train once over the rows, in their order."""
    rank = job.get("lora", 0)
    adapter = {"kind": "lora", "rank": rank, "alpha": 2 * rank} if rank else {"kind": "none"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        tunesmith.train(
            {
                "model": {"name": job["model"], "dtype": job.get("dtype", "auto")},
                "data": {"train": job["rows"], "shuffle": False},
                "batch": {"documents": job["documents"]},
                "adapter": adapter,
                "optim": {"lr": job["lr"], "schedule": "constant", "warmup": 0},
                "train": {"epochs": 1, "seed": job["seed"]},
                "device": {"threads": job["threads"], **job.get("device", {})},
                "checkpoint": {"every": None},
            },
            out=out,
        )
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if step["kind"] == "train"]
    timed = steps[job["warmup"] :]
    tokens = sum(step["tokens"] for step in timed)
    seconds = sum(step["seconds"] for step in timed)
    return {
        "tokens": tokens,
        "computed_tokens": sum(step["computed_tokens"] for step in timed),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "losses": [step["loss"] for step in steps],
        "step_tokens": [step["tokens"] for step in steps],
        "step_targets": [step["target_tokens"] for step in steps],
        "peak_rss": peak_memory(),
        "version": tunesmith.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
