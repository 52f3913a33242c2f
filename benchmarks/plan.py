"""What `tunesmith plan` says against what the run then takes, each in a process of its own.

    python benchmarks/plan.py --model MODEL --data gsm8k/train.jsonl   # results/plan.{json,md}
    python benchmarks/plan.py --model MODEL --data FILE --kinds lora   # that row alone, anew

Time is that of the steps (the sum of their `seconds`); memory is the highest resident size of the
process on a CPU, of the allocator on CUDA.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = {
    "full": [],
    "lora": ["adapter=lora"],
    "nf4 lora": ["adapter=lora", "model.quantization=nf4"],
}


def command(words: list[str]) -> str:
    """Standard output of a tunesmith command."""
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *words], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(done.stderr)
    return done.stdout


def compare(model: str, data: str, *, kind: str, threads: int) -> dict[str, Any]:
    """Plan and run once."""
    asked = [
        "--model", model, "--data", data, "train.epochs=1", "batch.documents=8",
        "device.cache=false",
        f"device.threads={threads}", "data.columns={prompt: question, completion: answer}",
        *KINDS[kind],
    ]  # fmt: skip
    planned = json.loads(command(["plan", *asked, "--json"]))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command(["train", *asked, "--out", str(out)])
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    seconds = sum(step["seconds"] for step in steps)
    peak = max(step["peak_memory"] for step in steps)
    return {
        "kind": kind,
        "steps": len(steps),
        "planned_seconds": planned["train_seconds"],
        "seconds": seconds,
        "time_error": planned["train_seconds"] / seconds - 1,
        "planned_peak": planned["measured"]["peak"],
        "peak": peak,
        "peak_error": planned["measured"]["peak"] / peak - 1,
        "memory": planned["memory"],
        "work": planned["work"],
    }


def page(found: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# Plan and run",
        "",
        f"{found['rows']} rows of GSM8K, one epoch, 8 documents a step, {found['machine']}, "
        f"{found['threads']} threads. Target: peak within 15%, time within 20%.",
        "",
        "| run | steps | planned s | took s | off | planned MiB | peak MiB | off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['kind']} | {r['steps']} | {r['planned_seconds']:.1f} | {r['seconds']:.1f} "
        f"| {r['time_error']:+.0%} | {r['planned_peak'] / 2**20:.0f} | {r['peak'] / 2**20:.0f} "
        f"| {r['peak_error']:+.0%} |"
        for r in found["runs"]
    ]
    return "\n".join(lines) + "\n"


def with_earlier(runs: list[dict[str, Any]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """These runs and, of the kinds that are not among them, those in the results with the same
    settings.
    """
    file = RESULTS / "plan.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    same = all(kept.get(key) == value for key, value in about.items())
    by_kind = {run["kind"]: run for run in [*(kept.get("runs", []) if same else []), *runs]}
    return [by_kind[kind] for kind in KINDS if kind in by_kind]


def save(runs: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Put runs into the results."""
    RESULTS.mkdir(exist_ok=True)
    found = {**about, "runs": with_earlier(runs, about)}
    (RESULTS / "plan.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "plan.md").write_text(page(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    given = parser.parse_args()
    about = {
        "rows": given.rows, "threads": given.threads, "machine": platform.machine() + " CPU",
        "model": Path(given.model).name,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        with open(given.data, encoding="utf-8") as lines:
            rows.write_text("".join(itertools.islice(lines, given.rows)), encoding="utf-8")
        for kind in given.kinds:
            save([compare(given.model, str(rows), kind=kind, threads=given.threads)], about)
    print((RESULTS / "plan.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
