"""What a long chat costs whose template rewrites its history: turn by turn, as a tree, and flat.

    python benchmarks/prefix.py --tokenizer QWEN3             # writes results/prefix.json and .md
    python benchmarks/prefix.py --tokenizer QWEN3 --turns 6 --rounds 1      # a quick look

A chat of `--turns` turns under a real tokenizer and template (Qwen3's drops the empty thoughts of
earlier turns, so each turn branches). Three ways to compute the same number of targets: every turn
as a row of its own; the tree of all turns; and one plain causal run of as many tokens as the tree
has, which is what the tree could cost at best. Measured in turn: one attention layer at the shape
of `--heads`, forward and backward apart, and the decoder with its head on a model of random
weights, forward and backward together.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.data.preprocess.prepare import prepare
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import load_template
from tunesmith.estimate.workload import row_lengths
from tunesmith.model.attention.dispatch import layout_attention
from tunesmith.model.load import wrap_causal_lm
from tunesmith.model.ops.malloc import keep_freed_memory
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

RESULTS = Path(__file__).resolve().parent / "results"
TEXT = (
    "the river runs past seven old mills and a station where nobody has waited since the winter "
    "of the long strike when trains stood still and people walked home over frozen fields"
)
VOCABULARY = 16_000
CPU = torch.device("cpu")


def chat(turns: int, *, asked: int, answered: int) -> dict[str, Any]:
    """A chat with so many words a question and an answer."""
    random = np.random.default_rng(0)
    known = TEXT.split()

    def text(words: int) -> str:
        return " ".join(random.choice(known, words))

    messages = [{"role": "system", "content": text(3 * asked)}]
    for _ in range(turns):
        messages.append({"role": "user", "content": text(asked)})
        messages.append({"role": "assistant", "content": text(answered)})
    return {"messages": messages}


def document_of(tokenizer: Path, row: dict[str, Any]) -> Document:
    """The chat as a run would have it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        prepared = prepare([Source("chat", path=path)], load_template(tokenizer), max_length=None)
        return prepared.documents[0]


def flat_document(plan: MicrobatchPlan) -> Document:
    """One run of as many tokens and targets as a plan has."""
    count = len(plan.target)
    ids = np.random.default_rng(0).integers(0, 1000, plan.tokens + 1).astype(np.int32)
    index = np.linspace(1, plan.tokens, count).astype(np.int32)
    index = np.unique(index)
    weight, message = np.ones(len(index), np.float32), np.zeros(len(index), np.int32)
    return Document((Segment(ids, -1, 0, index, weight, message),), Origin("flat", 0))


def few_words(plan: MicrobatchPlan) -> MicrobatchPlan:
    """The plan in a small vocabulary, so that a small model is not all head."""
    return replace(plan, ids=plan.ids % VOCABULARY, target=plan.target % VOCABULARY)


def time_layer(plans: list[MicrobatchPlan], shape: argparse.Namespace) -> tuple[float, float]:
    """Seconds of forward and of backward of one attention layer, over all micro-batches."""
    forward = backward = 0.0
    for plan in plans:
        made = torch.Generator().manual_seed(0)

        def tensor(heads: int, tokens: int = plan.tokens, generator: Any = made) -> torch.Tensor:
            values = torch.randn(1, heads, tokens, shape.head_dim, generator=generator)
            return values.to(getattr(torch, shape.dtype)).requires_grad_()

        query, key, value = tensor(shape.heads), tensor(shape.kv_heads), tensor(shape.kv_heads)
        module = torch.nn.Module()
        begin = time.perf_counter()
        output, _ = layout_attention(module, query, key, value, None, layout=plan.layout)
        middle = time.perf_counter()
        output.backward(torch.ones_like(output))
        forward += middle - begin
        backward += time.perf_counter() - middle
    return forward, backward


def random_model(shape: argparse.Namespace, vocabulary: int) -> Any:
    """A decoder of random weights in Qwen3's shape."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=shape.hidden, intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        max_position_embeddings=65_536, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = wrap_causal_lm(Qwen3ForCausalLM(config).to(getattr(torch, shape.dtype))).model
    return model.train()


def time_pass(model: Any, plans: list[MicrobatchPlan]) -> float:
    """Seconds of forward and backward of decoder and head, over all micro-batches."""
    head = functools.partial(head_loss, objective=nll)
    begin = time.perf_counter()
    for plan in plans:
        model(collate(plan, CPU), head).loss_sum.backward()
    seconds = time.perf_counter() - begin
    model.zero_grad(set_to_none=False)
    return seconds


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| way | tokens computed | attention calls | layer forward s | layer backward s "
        "| whole pass s | of the flat run, min-median-max |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, one in found["ways"].items():
        low, middle, high = one["of_flat"]
        forward, backward, whole = (
            statistics.median(one[key]) for key in ("forward", "backward", "pass")
        )
        lines.append(
            f"| {way} | {one['tokens']:,} | {one['calls']} | {forward:.3f} | {backward:.3f} "
            f"| {whole:.2f} | {low:.2f} - {middle:.2f} - {high:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder, with a template")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--asked", type=int, default=75, help="words of a question")
    parser.add_argument("--answered", type=int, default=135, help="words of an answer")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    keep_freed_memory()
    row = chat(arguments.turns, asked=arguments.asked, answered=arguments.answered)
    document = document_of(arguments.tokenizer, row)
    (tree,) = plan_step([document], micro_tokens=10**9)
    ways = {
        "a row for each turn": plan_step(
            [document], micro_tokens=tree.tokens, share_prefixes=False
        ),
        "one tree": [tree],
        "flat causal run": plan_step([flat_document(tree)], micro_tokens=10**9),
    }
    ways = {way: [few_words(plan) for plan in plans] for way, plans in ways.items()}
    model = random_model(arguments, VOCABULARY)
    seconds: dict[str, dict[str, list[float]]] = {
        way: {"forward": [], "backward": [], "pass": []} for way in ways
    }
    time_pass(model, ways["one tree"])  # warms up
    for _ in range(arguments.rounds):
        for way, plans in ways.items():
            forward, backward = time_layer(plans, arguments)
            seconds[way]["forward"].append(forward)
            seconds[way]["backward"].append(backward)
            seconds[way]["pass"].append(time_pass(model, plans))
    flat = seconds["flat causal run"]["pass"]
    found: dict[str, Any] = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "threads": torch.get_num_threads(),
        "segments": len(document.segments),
        "row_tokens": sum(row_lengths([document])),
        "ways": {},
    }
    for way, plans in ways.items():
        ratios = [one / other for one, other in zip(seconds[way]["pass"], flat, strict=True)]
        found["ways"][way] = {
            "tokens": sum(plan.tokens for plan in plans),
            "targets": sum(len(plan.target) for plan in plans),
            "calls": sum(1 + len(c.prefix) for plan in plans for c in plan.layout.chains),
            "of_flat": [min(ratios), statistics.median(ratios), max(ratios)],
            **seconds[way],
        }
    page = (
        f"# A chat of {arguments.turns} turns under a template that rewrites history\n\n"
        f"{found['segments']} segments; layer of {arguments.heads} heads of {arguments.head_dim}, "
        f"{arguments.kv_heads} of keys; model of {arguments.layers} layers, hidden size "
        f"{arguments.hidden}, {arguments.dtype}, {found['threads']} threads.\n\n{table(found)}"
    )
    print(page)
    if arguments.turns == 20:
        (RESULTS / "prefix.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "prefix.md").write_text(page)


if __name__ == "__main__":
    main()
