"""Time of the loss head against its three matrix products, and its peak memory.

    python benchmarks/head.py                     # writes results/head.json and head.md
    python benchmarks/head.py --vocabulary 50000 --targets 256      # a quick look, prints only

The head (`nll`, with its statistics) goes over logits a chunk at a time; the bare products make
all logits at once and nothing else: hidden @ W.T, logits @ W, logits.T @ hidden. Both run in one
process in turn, and each round gives a ratio. Memory is measured in a fresh process for each number
of targets: the highest resident size in forward and backward above what was held before them, which
includes the gradients of the weight and of the hidden states.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunesmith.metrics.environment import cpu_name
from tunesmith.model.ops.malloc import keep_freed_memory
from tunesmith.objectives import head_loss, nll
from tunesmith.objectives.head import CHUNK_BYTES, CHUNK_ROWS

VOCABULARY, HIDDEN, TARGETS, ROUNDS = 150_000, 1024, 512, 5
MEMORY_HIDDEN, MEMORY_TARGETS = 64, (256, 1024, 4096, 16384)
RESULTS = Path(__file__).resolve().parent / "results"


def inputs(vocabulary: int, hidden: int, targets: int) -> dict[str, torch.Tensor]:
    """Random float32 inputs of the head, with gradients asked for."""
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(targets, hidden, generator=generator).requires_grad_(),
        "weight": (torch.randn(vocabulary, hidden, generator=generator) * 0.02).requires_grad_(),
        "target": torch.randint(0, vocabulary, (targets,), generator=generator),
        "source": torch.arange(targets),
        "target_weight": torch.ones(targets),
    }


def run_head(made: dict[str, torch.Tensor]) -> None:
    """Forward and backward."""
    made["hidden"].grad = made["weight"].grad = None
    head_loss(**made, objective=nll).loss_sum.backward()


def run_bare(made: dict[str, torch.Tensor]) -> None:
    """The three products that no head can do without."""
    hidden, weight = made["hidden"].detach(), made["weight"].detach()
    logits = hidden @ weight.T
    _ = logits @ weight
    _ = logits.T @ hidden


def seconds(call: Callable[[], None]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_time(vocabulary: int, hidden: int, targets: int, rounds: int) -> dict[str, Any]:
    """Times of both in turn, after one unmeasured round."""
    keep_freed_memory()
    made = inputs(vocabulary, hidden, targets)
    run_bare(made)
    run_head(made)
    found = [
        {"bare": seconds(lambda: run_bare(made)), "head": seconds(lambda: run_head(made))}
        for _ in range(rounds)
    ]
    ratios = sorted(pair["head"] / pair["bare"] for pair in found)
    return {
        "vocabulary": vocabulary,
        "hidden": hidden,
        "targets": targets,
        "rounds": found,
        "ratio": {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]},
    }


def measure_memory(vocabulary: int, hidden: int, targets: int) -> dict[str, int]:
    """Bytes; run in a process of its own, since the highest resident size never falls."""
    made = inputs(vocabulary, hidden, targets)
    before = resident()
    run_head(made)
    return {
        "targets": targets,
        "peak_above_inputs": resident(peak=True) - before,
        "gradients": 4 * hidden * (vocabulary + targets),
        "all_logits": 4 * vocabulary * targets,
    }


def resident(*, peak: bool = False) -> int:
    """Bytes of memory that the process holds, or held at most."""
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory_table(vocabulary: int, hidden: int, counts: tuple[int, ...]) -> list[dict[str, int]]:
    """`measure_memory` for each number of targets, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    found = []
    for targets in counts:
        with context.Pool(1) as pool:
            found.append(pool.apply(measure_memory, (vocabulary, hidden, targets)))
    return found


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    speed, ratio = result["time"], result["time"]["ratio"]
    bare, head = (
        statistics.median(pair[name] for pair in speed["rounds"]) for name in ("bare", "head")
    )
    lines = [
        "# The loss head",
        "",
        f"{result['machine']}, {result['threads']} threads, torch {result['torch']}, float32, nll "
        "with all statistics, forward and backward. Made by `benchmarks/head.py`.",
        "",
        f"Time over {speed['targets']} targets, V = {speed['vocabulary']:,}, D = "
        f"{speed['hidden']}, median of {len(speed['rounds'])} rounds in turn:",
        "",
        "| | seconds |",
        "|---|---|",
        f"| three bare matrix products, all logits at once | {bare:.2f} |",
        f"| the head | {head:.2f} |",
        "",
        f"Ratio within a round: {ratio['median']:.2f} (lowest {ratio['min']:.2f}, highest "
        f"{ratio['max']:.2f}).",
        "",
        f"Peak memory above the inputs, V = {speed['vocabulary']:,}, D = "
        f"{result['memory_hidden']}, chunks of {result['chunk_bytes'] / 2**20:.0f} MiB, in MiB:",
        "",
        "| targets | peak | of it gradients | all logits would be |",
        "|---|---|---|---|",
    ]
    for row in result["memory"]:
        peak, grads, logits = (
            row[name] / 2**20 for name in ("peak_above_inputs", "gradients", "all_logits")
        )
        lines.append(f"| {row['targets']:,} | {peak:,.0f} | {grads:,.0f} | {logits:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--targets", type=int, default=TARGETS)
    asked = parser.parse_args()
    whole = (asked.vocabulary, asked.targets) == (VOCABULARY, TARGETS)
    counts = MEMORY_TARGETS if whole else (asked.targets, 4 * asked.targets)
    result = {
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "chunk_bytes": max(CHUNK_BYTES, CHUNK_ROWS * 4 * asked.vocabulary),
        "memory_hidden": MEMORY_HIDDEN,
        "memory": memory_table(asked.vocabulary, MEMORY_HIDDEN, counts),
        "time": measure_time(asked.vocabulary, HIDDEN, asked.targets, ROUNDS),
    }
    print(as_markdown(result))
    if whole:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(result, indent=2) + "\n"
        (RESULTS / "head.json").write_text(text, encoding="utf-8")
        (RESULTS / "head.md").write_text(as_markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
