"""What a step costs on models with recurrent layers: one row at a time, packed, and packed with a
shared prefix.

    python benchmarks/recurrent.py              # writes results/recurrent.json and .md
    python benchmarks/recurrent.py --rounds 1   # a quick look

32 short rows under one prefix, forward and backward, on models of random weights, one for each kind
of recurrence. The three ways take turns in each round. Measured are CPU seconds of the process,
which other processes of the machine disturb less than they do the clock. The first round warms up
and is left out. Losses of the three ways must agree.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.microbatch.planner import plan_step
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import wrap_causal_lm
from tunesmith.model.ops.malloc import keep_freed_memory
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

RESULTS = Path(__file__).resolve().parent / "results"
VOCABULARY = 4096
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": (
        "gated delta net",
        {
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "falcon_h1": (
        "Mamba 2",
        {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64},
    ),
    "lfm2": (
        "short convolution",
        {"layer_types": ["conv"] * 3 + ["full_attention"]},
    ),
    "mamba": ("Mamba 1", {"state_size": 16, "intermediate_size": 512, "time_step_rank": 16}),
}
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"micro_tokens": 1, "unpacked": True},
    "packed": {"micro_tokens": 10**6, "share_prefixes": False},
    "packed and shared": {"micro_tokens": 10**6},
}
HEAD = functools.partial(head_loss, objective=nll)


def short_rows(count: int, prefix: int) -> list[Document]:
    """Rows of 20 to 51 tokens behind a common prefix, the last 12 of each to be learned."""
    random = np.random.default_rng(0)
    shared = random.integers(3, VOCABULARY, prefix)
    documents: list[Document] = []
    for number in range(count):
        ids = np.concatenate([shared, random.integers(3, VOCABULARY, 20 + number % 32)])
        index = np.arange(len(ids) - 12, len(ids), dtype=np.int32)
        weight, message = np.ones(len(index), np.float32), np.zeros(len(index), np.int32)
        segment = Segment(ids.astype(np.int32), -1, 0, index, weight, message)
        documents.append(Document((segment,), Origin("made", number)))
    return documents


def random_model(family: str, options: dict[str, Any], *, unpacked: bool) -> CausalLM:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **options})
    model = wrap_causal_lm(AutoModelForCausalLM.from_config(config)).model.train()
    if unpacked:
        model.run_unpacked()
    return model


def step(model: CausalLM, rows: Sequence[Document], way: dict[str, Any]) -> tuple[float, float]:
    """CPU seconds of forward and backward, and the mean loss of the targets."""
    plans = plan_step(rows, **way)
    batches = [collate(plan) for plan in plans]
    model.zero_grad()
    targets = sum(row.target_tokens for row in rows)
    loss = 0.0
    begin = time.process_time()
    for batch in batches:
        output = model(batch, HEAD)
        (output.loss_sum / targets).backward()
        loss += output.loss_sum.item() / targets
    return time.process_time() - begin, loss


def measure(family: str, rows: Sequence[Document], rounds: int) -> dict[str, Any]:
    """Seconds of each way in each round, and how many tokens each computes."""
    kind, options = MODELS[family]
    models = {u: random_model(family, options, unpacked=u) for u in (True, False)}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        losses: list[float] = []
        for name, way in WAYS.items():
            taken, loss = step(models[way.get("unpacked", False)], rows, way)
            losses.append(loss)
            if number:
                seconds[name].append(taken)
        assert np.allclose(losses, losses[0], rtol=1e-4), losses
    tokens = {name: sum(plan.tokens for plan in plan_step(rows, **w)) for name, w in WAYS.items()}
    return {"family": family, "kind": kind, "seconds": seconds, "tokens": tokens}


def ratios(found: dict[str, Any], name: str) -> str:
    """How many times as fast as one at a time, within each round."""
    pairs = zip(found["seconds"]["alone"], found["seconds"][name], strict=True)
    times = sorted(alone / other for alone, other in pairs)
    return f"{times[0]:.1f} - {statistics.median(times):.1f} - {times[-1]:.1f}"


def table(measured: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    tokens = measured[0]["tokens"]
    lines = [
        "# Recurrent layers: one row at a time, packed, packed with a shared prefix",
        "",
        f"{about['rows']} rows of 20 to 51 tokens behind a prefix of {about['prefix']}; models of "
        f"4 layers, hidden size 256, float32, {about['threads']} thread(s), on a machine with 2 "
        f"cores and AVX2. CPU seconds of forward and backward, median of {about['rounds']} rounds; "
        f"{tokens['alone']:,} tokens alone, {tokens['packed and shared']:,} shared.",
        "",
        "| model | recurrence | alone s | packed s | packed and shared s "
        "| packed, times as fast | shared, times as fast (min-median-max) |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in measured:
        middle = [statistics.median(found["seconds"][name]) for name in WAYS]
        lines.append(
            f"| {found['family']} | {found['kind']} | {middle[0]:.2f} | {middle[1]:.2f} "
            f"| {middle[2]:.2f} | {ratios(found, 'packed')} "
            f"| {ratios(found, 'packed and shared')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=48)
    parser.add_argument("--only", choices=list(MODELS), nargs="*", default=list(MODELS))
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = short_rows(arguments.rows, arguments.prefix)
    measured = [measure(family, rows, arguments.rounds) for family in arguments.only]
    about = {
        "rows": arguments.rows, "prefix": arguments.prefix, "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    text = table(measured, about)
    print(text)
    if arguments.rounds > 1 and arguments.only == list(MODELS):
        (RESULTS / "recurrent.json").write_text(json.dumps({"about": about, "measured": measured}))
        (RESULTS / "recurrent.md").write_text(text)


if __name__ == "__main__":
    main()
