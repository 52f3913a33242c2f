"""The share of a step that is products with weights at the rate this machine multiplies at.

    python benchmarks/floor.py --model MODEL --data gsm8k/train.jsonl   # results/floor.{json,md}

`tunesmith bench` on full fine-tuning, in bfloat16 and in float32. The floor of a step is the
operations of its products over the best rate that was measured in the same process, in the
precision the products run in: on a processor without units for bfloat16 that is float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
TARGET = 0.65


def processor() -> str:
    """The processor's name and which of the instructions for bfloat16 it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = [line.partition(":") for line in text.splitlines()]
    found = {key.strip(): value.strip() for key, _, value in fields}
    flags = found.get("flags", "").split()
    units = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{found.get('model name', platform.machine())} ({', '.join(units)})"


def measure(model: str, data: str, *, dtype: str, steps: int, threads: int) -> dict[str, Any]:
    """One `tunesmith bench`, in a process of its own."""
    words = [
        "bench", "--model", model, "--data", data, "--steps", str(steps), "--json",
        "data.columns={prompt: question, completion: answer}", "device.cache=false",
        "train.epochs=1", "batch.documents=8", f"model.dtype={dtype}", f"device.threads={threads}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def page(found: dict[str, Any]) -> str:
    """The table, and where the time of a step goes."""
    runs: dict[str, Any] = found["runs"]
    first = next(iter(runs.values()))
    lines = [
        "# Share of the matrix product floor",
        "",
        f"{found['model']}, full fine-tuning on GSM8K, 8 documents a step, "
        f"{first['chosen']['micro_tokens']} tokens at a time, {found['processor']}, "
        f"{first['threads']} threads. Target: {TARGET:.0%}.",
        "",
        "| weights | products in | GFLOP/s | floor s | step s | share | tokens/s | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dtype, run in runs.items():
        count = len(run["steps"])
        lines.append(
            f"| {dtype} | {run['rate']['dtype']} | {run['rate']['flops_per_second'] / 1e9:.0f} "
            f"| {run['floor_seconds'] / count:.2f} | {run['seconds'] / count:.2f} "
            f"| {run['floor_share']:.0%} | {run['tokens_per_second']:.0f} "
            f"| {run['peak'] / 2**20:.0f} |"
        )
    lines += [
        "",
        "Where the time of a step goes, under the profiler:",
        "",
        f"| part | {' | '.join(runs)} |",
        f"|---|{'---|' * len(runs)}",
    ]
    for part in first["parts"]:
        shares = [run["parts"][part] / sum(run["parts"].values()) for run in runs.values()]
        lines.append(f"| {part} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    lines += [
        "",
        "The floor counts products with weights alone: two operations a weight and token forward, "
        "four backward, the head at targets only. Attention's scores, the optimizer and all other "
        "work are on top of it.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    given = parser.parse_args()
    runs = {
        dtype: measure(
            given.model, given.data, dtype=dtype, steps=given.steps, threads=given.threads
        )
        for dtype in given.dtypes
    }
    found = {"model": Path(given.model).name, "processor": processor(), "runs": runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "floor.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "floor.md").write_text(page(found), encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
