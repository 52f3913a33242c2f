"""What each idea brings: the plain loop, then Tunesmith with one idea more at a time.

    python benchmarks/ablation.py --case "GSM8K" SMOLLM2 gsm8k/train.jsonl 8 \\
        --case "tool chats, a row an answer" QWEN3 sgd_tools/dev.jsonl 16

Every run is a process of its own over the same rows in the same order; the losses of all are held
against the plain loop's. Writes results/ablation.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import Any

from peer_rows import write_rows
from vs_trl import processor

HERE = Path(__file__).resolve().parent
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain transformers, one document at a time": ("plain_run.py", {}),
    "+ logits at targets only, in chunks": (
        "tunesmith_run.py",
        {"attention": "unpacked", "share_prefixes": False},
    ),
    "+ a step's documents packed": ("tunesmith_run.py", {"share_prefixes": False}),
    "+ prefixes shared": ("tunesmith_run.py", {}),
}
COLORS = ("#9aa7b5", "#6f9fd0", "#3f78b5", "#174a7e")


def run(stage: str, job: dict[str, Any]) -> dict[str, Any]:
    """One stage in a process of its own."""
    script, device = STAGES[stage]
    command = [sys.executable, str(HERE / script), json.dumps({**job, "device": device})]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: {stage}\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{stage:<46} {result['tokens_per_second']:8.1f} tokens/s", file=sys.stderr, flush=True)
    return result


def compare(case: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """All stages over one set of rows, `rounds` times in turn."""
    name, model, data, documents = case
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        count = int(documents) * (arguments.steps + 1)
        write_rows(Path(data), count, rows, answers=arguments.answers if "answers" in name else 1)
        job = {
            "model": model, "rows": str(rows), "documents": int(documents), "dtype": "float32",
            "lr": 1e-4, "warmup": 1, "seed": 42, "threads": arguments.threads,
        }  # fmt: skip
        runs: dict[str, list[dict[str, Any]]] = {stage: [] for stage in STAGES}
        for _ in range(arguments.rounds):
            for stage in STAGES:
                runs[stage].append(run(stage, job))
    plain = next(iter(runs.values()))[0]["losses"]
    stages = [
        {
            "stage": stage,
            "tokens_per_second": max(one["tokens_per_second"] for one in done),
            "computed_share": done[0]["computed_tokens"] / done[0]["tokens"],
            "peak_rss": max(one["peak_rss"] for one in done),
            "largest_loss_gap": max(
                abs(a - b) for a, b in zip(done[0]["losses"], plain, strict=True)
            ),
        }
        for stage, done in runs.items()
    ]
    return {"case": name, "rows": count, "documents": int(documents), "stages": stages}


def table(found: list[dict[str, Any]], facts: str) -> str:
    """Markdown: best of the rounds, and each stage over the one before."""
    lines = [facts, ""]
    for case in found:
        lines += [
            f"{case['case']}: {case['rows']} rows, {case['documents']} a step.",
            "",
            "| stage | tokens/s | over the stage before | tokens computed | peak memory"
            " | largest gap of losses |",
            "|---|---|---|---|---|---|",
        ]
        before = None
        for stage in case["stages"]:
            speed = stage["tokens_per_second"]
            ratio = f"{speed / before:.2f}x" if before else ""
            lines.append(
                f"| {stage['stage']} | {speed:.0f} | {ratio} | {stage['computed_share']:.0%}"
                f" | {stage['peak_rss'] / 2**30:.2f} GiB | {stage['largest_loss_gap']:.5f} |"
            )
            before = speed
        lines.append("")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]]) -> str:
    """Bars of each stage's speed over the plain loop's, as SVG."""
    width, bar, gap, left = 760, 18, 34, 290
    most = max(
        stage["tokens_per_second"] / case["stages"][0]["tokens_per_second"]
        for case in found
        for stage in case["stages"]
    )
    parts, y = [], 10
    for case in found:
        y += 18
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(case["case"])}</text>')
        y += 8
        for color, stage in zip(COLORS, case["stages"], strict=True):
            ratio = stage["tokens_per_second"] / case["stages"][0]["tokens_per_second"]
            length = ratio / most * (width - left - 60)
            label = escape(stage["stage"])
            parts.append(
                f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{label}</text>'
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 4}" fill="{color}"/>'
                f'<text x="{left + length + 6:.1f}" y="{y + 12}">{ratio:.2f}x</text>'
            )
            y += bar
        y += gap - bar
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}"'
        f' font-family="sans-serif" font-size="12">\n<rect width="{width}" height="{y}"'
        ' fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", nargs=4, action="append", required=True,
        metavar=("NAME", "MODEL", "ROWS", "DOCUMENTS"),
        help="rows as for vs_trl.py; a NAME with the word answers repeats prompts (--answers)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run (2)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (2)")
    parser.add_argument("--answers", type=int, default=16, help="answers a prompt (16)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    path = arguments.out / "ablation.json"
    known = json.loads(path.read_text()) if path.exists() else []
    for case in arguments.case:  # cases of earlier calls stay, so that long ones run apart
        known = [entry for entry in known if entry["case"] != case[0]] + [compare(case, arguments)]
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    facts = f"{processor()}, {arguments.threads} threads, float32, full fine-tuning, AdamW."
    path.with_suffix(".md").write_text(table(known, facts), encoding="utf-8")
    path.with_suffix(".svg").write_text(plot(known), encoding="utf-8")
    print(table(known, facts))


if __name__ == "__main__":
    main()
