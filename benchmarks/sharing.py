"""What computing shared prefixes once brings: the same steps with and without, in turn.

    python benchmarks/sharing.py --model MODEL --case NAME ROWS DOCUMENTS [--case ...]

Both sides are one process with two copies of the model, which see the same documents step by step;
each ratio is of one step's two times, so a machine that slows down slows both. ROWS are as for
`vs_trl.py`; `example` is the calendar example. A NAME with the word answers repeats prompts, one
with the word tools writes the chats' tools into a system message. Losses must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peer_rows import write_rows

from tunesmith.build.build import build
from tunesmith.build.job import Job
from tunesmith.config.read import read_recipe
from tunesmith.estimate.probe import take_step
from tunesmith.estimate.workload import documents_of, planned

RESULTS = Path(__file__).resolve().parent / "results"
CHANGES = ["model.dtype=float32", "train.epochs=1", "data.shuffle=false"]
AGREE = 1e-4
"""Nats a target by which the losses of the two sides may differ."""


def job_of(model: Path, rows: Path, documents: int, *, share: bool) -> Job:
    """A run that is built and never begun."""
    given = [f"model.name={model}", f"data.train={rows}", f"batch.documents={documents}"]
    return build(read_recipe(None, [*given, *CHANGES, f"device.share_prefixes={share}"]))


def measure(model: Path, rows: Path, documents: int, steps: int) -> dict[str, Any]:
    """Seconds of each step on both sides, and the tokens that went through the decoder."""
    jobs = {share: job_of(model, rows, documents, share=share) for share in (True, False)}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    tokens = {True: 0, False: 0}
    for step in range(steps + 1):
        losses = {}
        for share, job in jobs.items():
            begin = time.perf_counter()
            losses[share] = take_step(job, step, lr=1e-4).loss
            if step:  # the first one warms up
                seconds[share].append(time.perf_counter() - begin)
                tokens[share] += sum(micro.tokens for micro in planned(job, step))
        if abs(losses[True] - losses[False]) > AGREE:
            raise SystemExit(f"error: the losses of step {step} differ: {losses}")
    timed = range(1, steps + 1)
    of_documents = sum(d.tokens for step in timed for d in documents_of(jobs[True], step))
    return {
        "shared_seconds": seconds[True],
        "alone_seconds": seconds[False],
        "ratios": [alone / one for one, alone in zip(*seconds.values(), strict=True)],
        "share_of_tokens": tokens[True] / tokens[False],
        "tokens_a_second": of_documents / sum(seconds[True]),
    }


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        f"SmolLM2-135M, float32, all parameters, {torch.get_num_threads()} threads.",
        "",
        "| rows | documents a step | tokens computed | time without / with, min-median-max "
        "| tokens/s |",
        "|---|---|---|---|---|",
    ]
    for case in found:
        ratios = case["ratios"]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        lines.append(
            f"| {case['name']} | {case['documents']} | {case['share_of_tokens']:.0%} "
            f"| {low:.2f} - {middle:.2f} - {high:.2f} | {case['tokens_a_second']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Time shared prefixes against none.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument(
        "--case", nargs=3, action="append", required=True, metavar=("NAME", "ROWS", "DOCUMENTS")
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (5)")
    parser.add_argument("--answers", type=int, default=16, help="answers a prompt (16)")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rows, documents in arguments.case:
            path, count = Path(folder) / f"{len(found)}.jsonl", int(documents)
            write_rows(
                None if rows == "example" else Path(rows), (arguments.steps + 1) * count, path,
                answers=arguments.answers if "answers" in name else 1,
                tools="text" if "tools" in name else "template",
            )  # fmt: skip
            case = measure(arguments.model, path, count, arguments.steps)
            found.append({"name": name, "documents": count, **case})
            print(name, *(f"{ratio:.2f}" for ratio in case["ratios"]), flush=True)
            (RESULTS / "sharing.json").write_text(json.dumps(found, indent=1) + "\n")
            (RESULTS / "sharing.md").write_text(table(found))
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
