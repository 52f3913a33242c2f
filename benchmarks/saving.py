"""What a checkpoint costs the steps around it: written between them, and beside them from a copy.

    python benchmarks/saving.py --model .cache/smollm2      # writes results/saving.json and .md

In each round of one process the same number of steps is timed three times: without a save, with one
that is written at once before them, and with one that is written beside them and waited for at
their end. What is lost to a save is what its steps took longer than those without. The three change
places from round to round, since a machine's speed drifts. Without `--model` a tiny one shows that
it runs; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import chat_rows, tiny_folder, write_jsonl  # noqa: E402
from tunesmith.build.build import build  # noqa: E402
from tunesmith.build.job import make_trainer  # noqa: E402
from tunesmith.config.read import read_recipe  # noqa: E402
from tunesmith.train.trainer import Trainer  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = ("no save", "between steps", "beside steps")
ENDLESS = 100_000


def trainer_of(arguments: argparse.Namespace, folder: Path) -> Trainer:
    model = arguments.model or tiny_folder(folder / "model", num_hidden_layers=2)
    rows = arguments.data or write_jsonl(folder / "rows.jsonl", chat_rows(64))
    recipe = read_recipe(
        {"model": str(model), "data": str(rows)},
        [
            "model.dtype=float32", "device.kind=cpu", f"device.threads={arguments.threads}",
            f"batch.documents={arguments.documents}", f"train.steps={ENDLESS}", "optim.lr=1e-5",
            "checkpoint.every=null", "checkpoint.keep=1",
        ],
    )  # fmt: skip
    run = folder / "run"
    run.mkdir()
    return make_trainer(build(recipe), run)


def one(trainer: Trainer, way: str, steps: int) -> dict[str, float]:
    """Seconds of so many steps, of the call that saves, and of the wait at their end."""
    saving: Any = trainer.checkpoints
    saving._beside = way == "beside steps"
    began = time.perf_counter()
    if way != "no save":
        trainer.save()
    saved = time.perf_counter()
    longest = 0.0
    for _ in range(steps):
        before = time.perf_counter()
        trainer._one_step()
        saving.poll(saving.state)
        longest = max(longest, time.perf_counter() - before)
    stepped = time.perf_counter()
    saving.wait()
    ended = time.perf_counter()
    return {
        "seconds": ended - began,
        "call": saved - began,
        "wait": ended - stepped,
        "longest_step": longest,
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(arguments, folder)
    for way in WAYS:  # memory of the copies, the allocator's, the disk's cache
        one(trainer, way, 2)
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(arguments.rounds):
        order = WAYS[number % 3 :] + WAYS[: number % 3]
        found = {way: one(trainer, way, arguments.steps) for way in order}
        rounds.append(found)
        print(json.dumps(found), flush=True)
    newest = max((folder / "run" / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    return {
        "model": Path(arguments.model).name if arguments.model else "tiny",
        "parameters": sum(p.numel() for p in trainer.training.model.parameters()),
        "checkpoint_bytes": sum(f.stat().st_size for f in newest.rglob("*") if f.is_file()),
        "steps": arguments.steps,
        "documents": arguments.documents,
        "threads": arguments.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {platform.system()}",
        "rounds": rounds,
    }


def summary(found: dict[str, Any]) -> dict[str, float]:
    """Middle values over the rounds; what is lost is taken inside a round."""
    rounds = found["rounds"]
    step = statistics.median(r["no save"]["seconds"] for r in rounds) / found["steps"]
    lost = {
        way: statistics.median(r[way]["seconds"] - r["no save"]["seconds"] for r in rounds)
        for way in WAYS[1:]
    }
    call = {way: statistics.median(r[way]["call"] for r in rounds) for way in WAYS[1:]}
    return {
        "step_seconds": step,
        "between_call": call["between steps"],
        "beside_call": call["beside steps"],
        "between_lost": lost["between steps"],
        "beside_lost": lost["beside steps"],
        "beside_wait": statistics.median(r["beside steps"]["wait"] for r in rounds),
        "call_share": call["beside steps"] / call["between steps"],
        "call_of_step": call["beside steps"] / step,
        "lost_share": lost["beside steps"] / lost["between steps"],
    }


def page(found: dict[str, Any]) -> str:
    s = summary(found)
    size = found["checkpoint_bytes"] / 1e9
    lines = [
        "# What a save costs",
        "",
        f"Written by `benchmarks/saving.py`: {found['model']}, {found['parameters']:,} "
        f"parameters, a checkpoint of {size:.2f} GB, {found['documents']} documents a step, "
        f"{found['threads']} threads, {len(found['rounds'])} rounds of "
        f"{found['steps']} steps a way; "
        f"{found['machine']}. Middle values.",
        "",
        "| | between steps | beside steps | share |",
        "|---|---:|---:|---:|",
        f"| seconds that the save keeps the loop | {s['between_call']:.3f} "
        f"| {s['beside_call']:.3f} | {s['call_share']:.1%} |",
        f"| seconds lost in all, slower steps among them | {s['between_lost']:.3f} "
        f"| {s['beside_lost']:.3f} | {s['lost_share']:.1%} |",
        f"| seconds waited for the writing after {found['steps']} steps | "
        f"| {s['beside_wait']:.3f} | |",
        "",
        f"A step takes {s['step_seconds']:.3f} s; beside steps, a save keeps the loop for "
        f"{s['call_of_step']:.1%} of one.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What a save costs the steps around it.")
    parser.add_argument("--model", help="a folder with a model; a tiny one if it is left out")
    parser.add_argument("--data", help="rows as JSON lines; short chats if it is left out")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of each way in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--place", help="where checkpoints are written; else a temporary folder")
    parser.add_argument("--results", default=str(RESULTS), help="folder of saving.json and .md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.place) as folder:
        found = measure(arguments, Path(folder))
    text = page(found)
    print(text)
    if arguments.model or arguments.results != str(RESULTS):
        target = Path(arguments.results)
        (target / "saving.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (target / "saving.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
