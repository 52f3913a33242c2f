"""A hundred steps on GSM8K: does the loss on held-out problems fall, and how fast are the steps?

    python benchmarks/gsm8k.py --model MODEL --train train.jsonl --test test.jsonl

Runs `tunesmith train examples/gsm8k.yaml` and writes what its metrics.jsonl says to
results/gsm8k.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def summarize(records: list[dict[str, Any]], machine: dict[str, Any]) -> dict[str, Any]:
    """Evaluations in order, and totals over the steps; the first step is left out of the speed."""
    steps = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    timed = steps[1:]
    few = max(1, min(10, len(steps) // 2))
    tokens = sum(step["tokens"] for step in timed)
    seconds = sum(step["seconds"] for step in timed)
    return {
        "evals": [{key: e[key] for key in ("step", "nll", "target_tokens")} for e in evals],
        "steps": len(steps),
        "averaged": few,
        "first_loss": statistics.mean(step["loss"] for step in steps[:few]),
        "last_loss": statistics.mean(step["loss"] for step in steps[-few:]),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory": max(step["peak_memory"] for step in steps),
        "machine": machine,
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    machine = summary["machine"]
    evals = "\n".join(f"| {entry['step']} | {entry['nll']:.4f} |" for entry in summary["evals"])
    return (
        f"{summary['steps']} steps; {machine.get('cpu')}, {machine.get('threads')} threads;"
        f" {summary['evals'][0]['target_tokens']:,} held-out target tokens.\n\n"
        f"| step | held-out loss, nats a token |\n|---|---|\n{evals}\n\n"
        f"Training loss, mean of the first and of the last {summary['averaged']} steps:"
        f" {summary['first_loss']:.4f}, {summary['last_loss']:.4f}."
        f" {summary['tokens_per_second']:.0f} tokens/s,"
        f" peak memory {summary['peak_memory'] / 2**30:.2f} GiB.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--train", required=True, help="rows of {question, answer}")
    parser.add_argument("--test", required=True, help="held-out rows of the same kind")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("changes", nargs="*", help="section.key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            *[sys.executable, "-m", "tunesmith", "train", str(HERE.parent / "examples/gsm8k.yaml")],
            *["--model", arguments.model, "--data", arguments.train, "--eval", arguments.test],
            *["--out", str(run), *arguments.changes],
        ]
        if code := subprocess.run(command).returncode:
            sys.exit(code)
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        machine = json.loads((run / "machine.json").read_text(encoding="utf-8"))
    summary = summarize([json.loads(line) for line in lines], machine)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "gsm8k.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(table(summary), encoding="utf-8")
    print(table(summary))


if __name__ == "__main__":
    main()
