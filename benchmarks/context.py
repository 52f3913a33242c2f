"""What a rank keeps for the backward pass when ranks share the tokens of one long document.

Counts bytes of torch's allocator and no time, over a random model. Ranks are processes on this
machine that talk by gloo.

    python benchmarks/context.py --out benchmarks/results
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as processes

SHAPE = dict(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=1024,
    max_position_embeddings=16384,
)
MODES = ("none", "layers")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--port", type=int, default=29733)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measure(place: int, tokens: int, count: int, port: int, results: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.data.microbatch.planner import plan_step
    from tunesmith.distributed.world import connect
    from tunesmith.model.load import wrap_causal_lm
    from tunesmith.model.memory.allocator import footprint
    from tunesmith.model.ops.activation_checkpointing import set_checkpointing
    from tunesmith.objectives import head_loss, nll
    from tunesmith.train.microbatches import collate, local_part
    from tunesmith.types import Document, Origin, Segment

    if count > 1:
        os.environ.update(
            RANK=str(place), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ranks = connect("cpu").with_context_parallel(count)
    config = AutoConfig.for_model("llama", **SHAPE)
    model = wrap_causal_lm(AutoModelForCausalLM.from_config(config)).model
    model.train()
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], tokens).astype(np.int32)
    index = np.arange(1, tokens, dtype=np.int32)
    ones = np.ones(len(index), np.float32)
    document = Document(
        (Segment(ids, -1, 0, index, ones, np.zeros_like(index)),), Origin("made up", 0)
    )
    (plan,) = plan_step([document], micro_tokens=tokens)
    part = local_part(plan, ranks.cp)
    gradients = sum(p.numel() * 4 for p in model.parameters())
    found: dict[str, Any] = {"tokens": part.tokens}
    for mode in MODES:
        set_checkpointing(model.base, mode)
        with footprint("cpu") as forward:
            output = model(collate(part), functools.partial(head_loss, objective=nll))
        with footprint("cpu") as backward:
            (output.loss_sum / plan.tokens).backward()
        found[f"{mode} kept"] = forward.held
        found[f"{mode} peak"] = max(forward.peak, forward.held + backward.peak) - gradients
        model.zero_grad()
        found["loss"] = float(
            ranks.all_reduce_sum(np.asarray([float(output.loss_sum.detach())]))[0]
        ) / (tokens - 1)
    results[place] = found
    ranks.close()


def page(tokens: int, found: dict[int, dict[int, dict[str, Any]]]) -> str:
    columns = [f"{mode} {what}" for mode in MODES for what in ("kept", "peak")]
    words = {"none": "nothing", "layers": "every layer"}
    heads = [f"{words[c.split()[0]]} recomputed: {c.split()[1]}" for c in columns]
    lines = [
        "# A long document on several ranks",
        "",
        f"One document of {tokens:,} tokens, every token a target, through a random llama with",
        f"{SHAPE['num_hidden_layers']} layers of {SHAPE['hidden_size']}, "
        f"{SHAPE['num_attention_heads']} heads, {SHAPE['num_key_value_heads']} key heads and a "
        f"vocabulary of {SHAPE['vocab_size']:,}, in float32",
        "(`benchmarks/context.py`). MiB of torch's allocator on the rank with most, and the share",
        "of what one process takes: *kept* by the forward pass for the backward, and the *peak* of",
        "both, less the gradients, which every rank has whole. Weights are not counted.",
        "",
        f"| `device.context_parallel` | tokens on a rank | {' | '.join(heads)} | loss |",
        "|---:|---:|" + "---:|" * (len(columns) + 1),
    ]
    first = found[min(found)]
    for count, ranks in found.items():
        cells = [f"{count}", f"{max(r['tokens'] for r in ranks.values()):,}"]
        for name in columns:
            size, whole = (max(r[name] for r in who.values()) for who in (ranks, first))
            cells.append(f"{size / 2**20:.1f} ({size / whole:.3f})")
        lines.append(f"| {' | '.join(cells)} | {ranks[0]['loss']:.6f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = arguments()
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for count in options.context:
        with processes.Manager() as manager:
            results = manager.dict()
            processes.spawn(
                measure, (options.tokens, count, options.port + count, results), nprocs=count
            )
            found[count] = dict(results)
        print(count, found[count], flush=True)
    text = page(options.tokens, found)
    print(text)
    if options.out:
        (options.out / "context.md").write_text(text, encoding="utf-8")
        (options.out / "context.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
