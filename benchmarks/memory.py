"""Memory, time and gradients of a micro-batch in each way of keeping activations.

    python benchmarks/memory.py --model MODEL              # results/memory.json and memory.md
    python benchmarks/memory.py --model MODEL --only selective    # one, put into the results

One document of `--tokens` random tokens, all of them targets, forward and backward with the head.
Memory is counted in a process of its own for each way; the gradients are there before, so what is
counted is activations, the head and temporaries. Bytes are those of torch's allocator above what
was held before. The gradients of that pass are held against those of `none`. With `+offload`
activations go to the host's memory; on a CPU, which is the host, what would move is counted, and
what stays on the device is what was kept without it.

Time is taken in one process, all ways in turn for `--rounds` rounds, of a document of
`--time-tokens` tokens; each round gives a ratio to its own `none`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.microbatch.planner import plan_step
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import load_causal_lm, resolve_model
from tunesmith.model.memory.allocator import footprint
from tunesmith.model.ops.activation_checkpointing import set_checkpointing
from tunesmith.model.ops.activation_offload import offloaded
from tunesmith.model.ops.malloc import keep_freed_memory
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Batch, Document, Origin, Segment

RESULTS = Path(__file__).resolve().parent / "results"
WAYS = ("none", "selective", "2", "layers", "none+offload", "layers+offload")
TIMES = "times"
HEAD = functools.partial(head_loss, objective=nll)


def random_batch(tokens: int, vocabulary: int, device: torch.device) -> Batch:
    """One document without a shared prefix."""
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens).astype(np.int32)
    index = np.arange(1, tokens, dtype=np.int32)
    ones = np.ones(len(index), np.float32)
    segment = Segment(ids, -1, 0, index, ones, np.zeros(len(index), np.int32))
    (plan,) = plan_step([Document((segment,), Origin("random", 0))], micro_tokens=tokens)
    return collate(plan, device)


def measure(model: CausalLM, batch: Batch, way: str, device: torch.device) -> dict[str, Any]:
    """Bytes kept for the backward pass, moved to the host, and the most in a pass, whose gradients
    are left in the model.
    """
    offload = choose(model, way)
    moved: list[int] = []
    note = lambda tensor: moved.append(tensor.numel() * tensor.element_size())  # noqa: E731
    host = offloaded(model, copied=note) if offload else nullcontext()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with footprint(device) as forward, host:
        hidden = model.hidden(batch)
    with footprint(device) as backward:
        through_head(model, hidden, batch)
        del hidden
    return {
        "way": way,
        "kept": forward.held,
        "moved": sum(moved),
        "peak": max(forward.peak, forward.held + backward.peak),
    }


def choose(model: CausalLM, way: str) -> bool:
    """Set the model to the way; whether activations are to go to the host."""
    mode, _, offload = way.partition("+")
    set_checkpointing(model.base, int(mode) if mode.isdigit() else mode)
    return bool(offload)


def timed(model: CausalLM, batch: Batch, *, rounds: int, device: torch.device) -> dict[str, Any]:
    """Of each way, seconds of a pass over those of `none` in the same round."""
    ratios: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):  # the first warms up
        seconds: dict[str, float] = {}
        for way in WAYS if number else WAYS[:1]:
            offload = choose(model, way)
            model.zero_grad()
            started = time.perf_counter()
            model(batch, HEAD, offload=offload).loss_sum.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[way] = time.perf_counter() - started
            if number:
                ratios[way].append(seconds[way] / seconds[WAYS[0]])
    return ratios


def through_head(model: CausalLM, hidden: torch.Tensor, batch: Batch) -> None:
    """Loss and gradients from hidden states."""
    HEAD(
        hidden, model.head.weight, model.head.bias,
        source=batch.source, target=batch.target, target_weight=batch.weight,
        transform=None if model.logits.identity else model.logits.apply,
    ).loss_sum.backward()  # fmt: skip


def difference(model: CausalLM, file: Path) -> float | None:
    """The largest relative L2 difference of a gradient from those in the file; they are written
    there if it is not.
    """
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    if not file.exists():
        torch.save(mine, file)
        return None
    first = torch.load(file)
    return max(float((mine[n] - first[n]).norm() / first[n].norm()) for n in first)


def one(given: argparse.Namespace) -> None:
    """Measure one way, or the time of all, and put it into the results."""
    keep_freed_memory()
    device = torch.device(given.device)
    model = load_causal_lm(resolve_model(given.model), dtype="float32", device=device).model.train()
    vocabulary = model.config.vocab_size
    about = {
        "model": Path(given.model).name,
        "dtype": "float32",
        "tokens": given.tokens,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
    }
    file = given.results / "memory.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if any(kept.get(key) != value for key, value in about.items()):
        kept = {}
    whole = {**about, "ways": kept.get("ways", []), "times": kept.get("times")}
    if given.only == TIMES:
        batch = random_batch(given.time_tokens, vocabulary, device)
        ratios = timed(model, batch, rounds=given.rounds, device=device)
        whole["times"] = {"tokens": given.time_tokens, "ratios": ratios}
    else:
        found = measure(model, random_batch(given.tokens, vocabulary, device), given.only, device)
        found["gradients_off"] = difference(model, given.gradients)
        ways = {w["way"]: w for w in [*whole["ways"], found]}
        whole["ways"] = [ways[way] for way in WAYS if way in ways]
    file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if whole["ways"]:
        (given.results / "memory.md").write_text(page(whole), encoding="utf-8")


def page(found: dict[str, Any]) -> str:
    """The table, relative to the first way."""
    first, times = found["ways"][0], found.get("times") or {"tokens": 0, "ratios": {}}
    rounds = max(map(len, times["ratios"].values()), default=0)
    lines = [
        "# Memory of activations",
        "",
        f"{found['model']}, {found['dtype']}, {found['tokens']} tokens in one micro-batch, "
        f"{found['device']}, {found['threads']} threads. Gradients: the largest relative L2 "
        f"difference from those of {first['way']}, 0 is the same to the bit.",
    ]
    if rounds:
        lines[-1] += (
            f" Time is over that of {first['way']} in the same round, least, median and most of "
            f"{rounds} rounds, with {times['tokens']} tokens."
        )
    lines += [
        "",
        "| activations | kept MiB | to the host MiB | peak MiB | peak | time | gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in found["ways"]:
        off = way["gradients_off"]
        lines.append(
            f"| {way['way']} | {way['kept'] / 2**20:.0f} | {way['moved'] / 2**20:.0f} "
            f"| {way['peak'] / 2**20:.0f} | {way['peak'] / first['peak']:.2f} "
            f"| {spread(times['ratios'].get(way['way'], []))} "
            f"| {'-' if off is None else f'{off:.1g}'} |"
        )
    if found["device"] == "CPU" and any(way["moved"] for way in found["ways"]):
        lines += [
            "",
            "A CPU has no other memory to move to, so there `kept` and `peak` hold the copies too; "
            "on a device `kept` is less by what moves.",
        ]
    return "\n".join(lines) + "\n"


def spread(ratios: list[float]) -> str:
    """Least, median and most."""
    if not ratios:
        return "-"
    return f"{min(ratios):.2f}–{statistics.median(ratios):.2f}–{max(ratios):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--time-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=(*WAYS, TIMES), help="measure this alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--gradients", type=Path, help="file of the gradients of none")
    given = parser.parse_args()
    given.results.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        given.gradients = given.gradients or Path(folder) / "gradients.pt"
        if given.only:
            one(given)
        else:
            for way in (*WAYS, TIMES):
                words = [*sys.argv, "--only", way, "--gradients", str(given.gradients)]
                subprocess.run([sys.executable, *words], check=True)
    print((given.results / "memory.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
