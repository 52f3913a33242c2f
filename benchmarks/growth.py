"""How time a token grows: with the number of documents before a run, with their length in a step.

    python benchmarks/growth.py --model MODEL --gsm8k train.jsonl   # results/growth.json and .md
    python benchmarks/growth.py --model MODEL --gsm8k train.jsonl --documents 1000 --lengths 512

Preparation: the given rows over and over under changing numbers, read, rendered and tokenised, each
time in a fresh process; then the order of an epoch and every step's micro-batches, in steps of 32.
A training step: a fixed number of tokens in documents of one length through a model of random
weights, forward, backward and update. Attention of a token grows with what stands before it, so
next to the time stand the share of attention in the operations, the operations a token, and the
seconds that attention alone takes at the same layout. What is left must be flat. All sizes run in
turn, round after round, and ratios are taken inside a round.
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
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
DOCUMENTS = (1000, 8000, 64_000)
LENGTHS = (512, 1024, 2048, 4096, 8192)
STEP_TOKENS, STEP_DOCUMENTS = 8192, 32
SHAPE = {"hidden": 512, "layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 64, "vocabulary": 8000}


def write_rows(given: Path, out: Path, count: int) -> None:
    """So many rows, each under a number of its own."""
    rows = [json.loads(line) for line in given.read_text(encoding="utf-8").splitlines()]
    with out.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            question = f"{number}. {row['question']}"
            file.write(json.dumps({"prompt": question, "completion": row["answer"]}) + "\n")


def prepare_alone(model: str, path: Path) -> dict[str, float]:
    """Seconds of preparation and of planning an epoch, and the tokens; run in its own process."""
    from tunesmith.data.microbatch.planner import plan_step
    from tunesmith.data.preprocess.document_store import token_counts
    from tunesmith.data.preprocess.prepare import prepare
    from tunesmith.data.sampling.sampler import BatchSampler
    from tunesmith.data.sources.sources import Source
    from tunesmith.data.templates.load import load_template

    template = load_template(model)
    begin = time.perf_counter()
    documents = prepare([Source("rows", path=path)], template, max_length=None).documents
    prepared = time.perf_counter()
    lengths = token_counts(documents)
    order = BatchSampler(lengths, documents=STEP_DOCUMENTS, seed=0, shuffle=True)
    for step in range(order.steps_per_epoch):
        chosen = [documents[int(number)] for number in order.step_indices(step)]
        plan_step(chosen, micro_tokens=STEP_TOKENS)
    planned = time.perf_counter()
    return {
        "prepare": prepared - begin,
        "plan": planned - prepared,
        "tokens": int(lengths.astype(np.int64).sum()),
    }


def measure_preparation(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds a token for each count of documents."""
    found = {count: {"prepare": [], "plan": []} for count in arguments.documents}
    with tempfile.TemporaryDirectory() as folder:
        paths = {count: Path(folder) / f"{count}.jsonl" for count in arguments.documents}
        for count, path in paths.items():
            write_rows(arguments.gsm8k, path, count)
        for _ in range(arguments.rounds):
            for count, path in paths.items():
                command = [
                    sys.executable, __file__, "--model", arguments.model, "--alone", str(path)
                ]  # fmt: skip
                answer = subprocess.run(command, check=True, capture_output=True, text=True)
                one = json.loads(answer.stdout.splitlines()[-1])
                for part in ("prepare", "plan"):
                    found[count][part].append(1e6 * one[part] / one["tokens"])
    return [{"documents": count, **parts} for count, parts in found.items()]


def random_model() -> Any:
    """A decoder of random weights and its optimizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunesmith.model.load import wrap_causal_lm
    from tunesmith.optim import AdamW

    config = LlamaConfig(
        vocab_size=SHAPE["vocabulary"], hidden_size=SHAPE["hidden"],
        intermediate_size=3 * SHAPE["hidden"], num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"], num_key_value_heads=SHAPE["kv_heads"],
        head_dim=SHAPE["head_dim"], max_position_embeddings=max(LENGTHS),
    )  # fmt: skip
    torch.manual_seed(0)
    model = wrap_causal_lm(LlamaForCausalLM(config)).model.train()
    return model, AdamW(model.named_parameters())


def documents_of(length: int) -> list[Any]:
    """As many documents of a length as a step holds; every fourth token a target."""
    from tunesmith.types import Document, Origin, Segment

    random = np.random.default_rng(0)
    found = []
    for number in range(STEP_TOKENS // length):
        ids = random.integers(0, SHAPE["vocabulary"], length + 1).astype(np.int32)
        index = np.arange(4, length + 1, 4, dtype=np.int32)
        ones = np.ones(len(index), np.float32)
        segment = Segment(ids, -1, 0, index, ones, np.zeros(len(index), np.int32))
        found.append(Document((segment,), Origin("random", number)))
    return found


def attention_seconds(plans: list[Any]) -> float:
    """Forward and backward of attention alone at the layouts of a step, in all layers."""
    import torch

    from tunesmith.model.attention.dispatch import layout_attention

    total = 0.0
    for plan in plans:
        made = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, SHAPE[heads], plan.tokens, SHAPE["head_dim"], generator=made)
            .bfloat16()
            .requires_grad_()
            for heads in ("heads", "kv_heads", "kv_heads")
        )
        for _ in range(SHAPE["layers"]):
            begin = time.perf_counter()
            output, _ = layout_attention(
                torch.nn.Module(), query, key, value, None, layout=plan.layout
            )
            output.backward(torch.ones_like(output))
            total += time.perf_counter() - begin
    return total


def operations(model: Any, length: int) -> tuple[float, float]:
    """Operations a token of a step, of everything and of attention's scores; documents of a length.

    Six for each weight and token; a pair of tokens costs a head 4 for each number of its size
    forward (scores and values) and 10 backward (scores again, and four gradients).
    """
    inner = sum(p.numel() for p in model.decoder.layers.parameters())
    dense = 6.0 * (inner + model.head.weight.numel() / 4)
    pairs = (length + 1) / 2
    attention = 14.0 * SHAPE["layers"] * SHAPE["heads"] * SHAPE["head_dim"] * pairs
    return dense + attention, attention


def measure_steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds a token of a step, and of its attention, for each length."""
    import torch

    from tunesmith.data.microbatch.planner import plan_step
    from tunesmith.model.ops.malloc import keep_freed_memory
    from tunesmith.objectives import nll
    from tunesmith.train.loss import StepLoss
    from tunesmith.train.step import train_step

    keep_freed_memory()
    device = torch.device("cpu")
    model, optimizer = random_model()
    loss = StepLoss(nll, steps=1000)
    plans = {
        length: plan_step(documents_of(length), micro_tokens=STEP_TOKENS)
        for length in arguments.lengths
    }
    found = {length: {"step": [], "attention": []} for length in plans}
    run = functools.partial(train_step, model, optimizer, lr=1e-5, max_grad_norm=1.0, device=device)
    first = arguments.lengths[0]
    run(plans[first], loss, documents=STEP_TOKENS // first)  # warms up
    for _ in range(arguments.rounds):
        for length, cut in plans.items():
            begin = time.perf_counter()
            run(cut, loss, documents=STEP_TOKENS // length)
            seconds = time.perf_counter() - begin
            found[length]["step"].append(1e6 * seconds / STEP_TOKENS)
            found[length]["attention"].append(1e6 * attention_seconds(cut) / STEP_TOKENS)
    records = []
    for length, one in found.items():
        whole, attention = operations(model, length)
        records.append(
            {"length": length, "operations": whole, "attention_share": attention / whole, **one}
        )
    return records


def _of_first(values: list[float], first: list[float]) -> str:
    ratios = [one / other for one, other in zip(values, first, strict=True)]
    return f"{min(ratios):.2f} - {statistics.median(ratios):.2f} - {max(ratios):.2f}"


def page(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Growth", "", "Microseconds a token, medians; ratios to the first line are taken inside "
        "a round: least, middle, largest.", "",
        "| documents | preparation | step planning | both, of the first |", "|---|---|---|---|",
    ]  # fmt: skip
    both = [
        [a + b for a, b in zip(one["prepare"], one["plan"], strict=True)]
        for one in found["preparation"]
    ]
    for one, sums in zip(found["preparation"], both, strict=True):
        lines.append(
            f"| {one['documents']:,} | {statistics.median(one['prepare']):.3f} "
            f"| {statistics.median(one['plan']):.3f} | {_of_first(sums, both[0])} |"
        )
    lines += [
        "", f"A step of {STEP_TOKENS:,} tokens, {SHAPE['layers']} layers, hidden size "
        f"{SHAPE['hidden']}, float32:", "",
        "| tokens a document | step | of the first | operations, of the first "
        "| attention's share of operations | attention alone | the rest | the rest, of the first |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    steps = found["steps"]
    rests = [[a - b for a, b in zip(one["step"], one["attention"], strict=True)] for one in steps]
    for one, rest in zip(steps, rests, strict=True):
        lines.append(
            f"| {one['length']:,} | {statistics.median(one['step']):.1f} "
            f"| {_of_first(one['step'], steps[0]['step'])} "
            f"| {one['operations'] / steps[0]['operations']:.2f} | {one['attention_share']:.0%} "
            f"| {statistics.median(one['attention']):.1f} | {statistics.median(rest):.1f} "
            f"| {_of_first(rest, rests[0])} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a model, for its tokenizer")
    parser.add_argument("--gsm8k", type=Path, help="rows of question and answer")
    parser.add_argument("--documents", type=int, nargs="*", default=list(DOCUMENTS))
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone is not None:
        print(json.dumps(prepare_alone(arguments.model, arguments.alone)))
        return
    found = {
        "preparation": measure_preparation(arguments) if arguments.gsm8k else [],
        "steps": measure_steps(arguments),
    }
    print(page(found))
    if arguments.documents == list(DOCUMENTS) and arguments.lengths == list(LENGTHS):
        (RESULTS / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "growth.md").write_text(page(found))


if __name__ == "__main__":
    main()
