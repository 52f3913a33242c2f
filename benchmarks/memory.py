"""Memory and time of a micro-batch in each mode of keeping activations.

    python benchmarks/memory.py --model MODEL          # writes results/memory.json and memory.md

One document of `--tokens` random tokens, all of them targets, forward and backward with the head;
the gradients are there before, so what is counted is activations, the head and temporaries. Bytes
are those of torch's allocator above what was held before. Each mode is timed after one pass that
warms up.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.batch import collate
from tunesmith.data.packing import plan_step
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.checkpointing import set_checkpointing
from tunesmith.model.footprint import footprint
from tunesmith.model.load import load_causal_lm, resolve_model
from tunesmith.objectives import head_loss, nll
from tunesmith.train.device import keep_freed_memory
from tunesmith.types import Batch, Document, Origin, Segment

RESULTS = Path(__file__).resolve().parent / "results"
MODES = ("none", "selective", 2, "layers")


def random_batch(tokens: int, vocabulary: int, device: torch.device) -> Batch:
    """One document without a shared prefix."""
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens).astype(np.int32)
    index = np.arange(1, tokens, dtype=np.int32)
    ones = np.ones(len(index), np.float32)
    segment = Segment(ids, -1, 0, index, ones, np.zeros(len(index), np.int32))
    (plan,) = plan_step([Document((segment,), Origin("random", 0))], micro_tokens=tokens)
    return collate(plan, device)


def measure(model: CausalLM, batch: Batch, mode: str | int, device: torch.device) -> dict[str, Any]:
    """Bytes kept for the backward pass, the most in a pass, and seconds of a pass."""
    head = functools.partial(head_loss, objective=nll)
    set_checkpointing(model.base, "none" if mode == "offload" else mode)
    model.offload = mode == "offload"

    def once() -> float:
        started = time.perf_counter()
        model(batch, head).loss_sum.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    with footprint(device) as whole:  # warms up on the way
        once()
    with footprint(device) as forward:
        hidden = model.hidden(batch)
    del hidden
    seconds = once()
    return {"mode": mode, "kept": forward.held, "peak": whole.peak, "seconds": seconds}


def page(found: dict[str, Any]) -> str:
    """The table, relative to the first mode."""
    first = found["modes"][0]
    lines = [
        "# Memory of activations",
        "",
        f"{found['model']}, {found['dtype']}, {found['tokens']} tokens in one micro-batch, "
        f"{found['device']}, {found['threads']} threads.",
        "",
        "| gradient_checkpointing | kept MiB | peak MiB | peak | time |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {m['mode']} | {m['kept'] / 2**20:.0f} | {m['peak'] / 2**20:.0f} "
        f"| {m['peak'] / first['peak']:.2f} | {m['seconds'] / first['seconds']:.2f} |"
        for m in found["modes"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    keep_freed_memory()
    device = torch.device(given.device)
    model = load_causal_lm(resolve_model(given.model), dtype="float32", device=device).train()
    batch = random_batch(given.tokens, model.config.vocab_size, device)
    head = functools.partial(head_loss, objective=nll)
    model(batch, head).loss_sum.backward()  # the gradients are there from here
    modes: list[str | int] = [*MODES, *(["offload"] if device.type != "cpu" else [])]
    found = {
        "model": Path(given.model).name,
        "dtype": "float32",
        "tokens": given.tokens,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "modes": [measure(model, batch, mode, device) for mode in modes],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "memory.md").write_text(page(found), encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
