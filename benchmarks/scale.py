"""Speed and memory of several ranks on this machine, against one.

    python benchmarks/scale.py          # writes results/scale.json and scale.md

A random model of `--layers` layers learns from random documents. Every rank has one thread, so that
two ranks have twice the cores of one; each step is the same for all, and steps are timed after one
that warms up. Cases run in turn, each in fresh processes, `--rounds` times, and a ratio is taken
inside a round. Memory is what the tensors of a rank hold: weights, gradients, optimizer.

What two ranks should take is computed from parts that are measured apart: what one process computes
and what its optimizer takes, by how much of the work the ranks' slowest has, and messages of the
model's sizes, sent when nothing else goes on. Nothing is taken to hide behind anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
CASES = (("none", 1), ("none", 2), ("full", 2), ("full", 4))
TIMED = 2
"""Up to this many ranks a case is timed; more of them share the cores."""


def work(arguments: argparse.Namespace) -> None:
    """One rank of a case: train, then write what it measured."""
    import torch

    from tunesmith.build.build import build
    from tunesmith.build.job import make_trainer
    from tunesmith.config.read import read_recipe
    from tunesmith.distributed.world import connect

    folder = Path(arguments.worker)
    torch.set_num_threads(1)
    ranks = connect("cpu")
    recipe = read_recipe(
        {"model": str(folder / "model"), "data": str(folder / "rows.jsonl")},
        [
            "model.dtype=float32", "device.kind=cpu", "device.share_prefixes=false",
            f"device.micro_tokens={arguments.micro_tokens}", f"device.shard={arguments.shard}",
            f"batch.documents={arguments.documents}", f"train.steps={arguments.steps + 1}",
            "optim.lr=1e-4",
        ],
    )  # fmt: skip
    job = build(recipe, world=ranks)
    seconds: list[float] = []

    class Clock:
        def write(self, record: Any) -> None:
            if record["kind"] == "train":
                seconds.append(record["seconds"])

        def close(self) -> None: ...

    trainer = make_trainer(job, folder, [Clock()])
    kept = held(job)
    note_gradients(job, kept)
    updates = note_updates(job)
    for _ in range(arguments.steps + 1):
        trainer._one_step()
    record = {
        "rank": ranks.rank, "bytes": kept, "seconds": seconds[1:], "cut": cut(job),
        "optimizer": updates[1:], "slowest": slowest(job, arguments.steps), **messages(job),
    }  # fmt: skip
    (folder / f"{arguments.shard}-{ranks.size}-{ranks.rank}.json").write_text(json.dumps(record))
    ranks.close()


def held(job: Any) -> dict[str, int]:
    """Bytes of this rank's weights, gradients and optimizer between steps."""
    import torch

    def size(tensors: Any) -> int:
        local = [getattr(t, "_local_tensor", t) for t in tensors]
        found = {t.data_ptr(): t.numel() * t.element_size() for t in local if t.numel()}
        return sum(found.values())

    state = [t for slot in job.training.optimizer._slots.values() for t in slot.state.values()]
    weights = [p.detach() for p in job.training.model.parameters()]
    return {
        "weights": size(weights),
        "optimizer": size(state),
        "parameters": sum(p.numel() for p in job.training.model.parameters()),
        "threads": torch.get_num_threads(),
    }


def note_gradients(job: Any, kept: dict[str, int]) -> None:
    """Have the bytes of the gradients that a step hands to the optimizer noted."""
    norm = job.training.optimizer.grad_norm

    def noted() -> Any:
        grads = [p.grad for p in job.training.optimizer.parameters if p.grad is not None]
        kept["gradients"] = sum(grad.numel() * grad.element_size() for grad in grads)
        return norm()

    job.training.optimizer.grad_norm = noted


def note_updates(job: Any) -> list[float]:
    """Seconds of each update of the weights from now on."""
    own, seconds = job.training.optimizer.step, []

    def timed(lr: float, grad_scale: float = 1.0) -> None:
        started = time.perf_counter()
        own(lr, grad_scale)
        seconds.append(time.perf_counter() - started)

    job.training.optimizer.step = timed
    return seconds


def slowest(job: Any, steps: int) -> float:
    """How much of the timed steps' work stands in the way of their end: of two micro-batches that
    run at once on two ranks the larger. 1 on one rank.
    """
    from tunesmith.distributed.load_balance import IDLE, assign
    from tunesmith.train.microbatches import step_plans

    waited = total = 0.0
    for number in range(1, steps + 1):
        documents = [job.data.documents[int(n)] for n in job.data.sampler.step_indices(number)]
        plans = step_plans(
            documents,
            job.training.world,
            work_model=job.microbatching.work,
            micro_tokens=job.microbatching.micro_tokens,
            share_prefixes=job.microbatching.share_prefixes,
        )
        each = [job.microbatching.work.of(plan) for plan in plans]
        total += sum(each)
        for dealt in assign(each, job.training.world.size):
            waited += max(each[n] for n in dealt if n != IDLE)
    return waited / total


def messages(job: Any) -> dict[str, float]:
    """Seconds of what two ranks send, each kind by itself: `reduce`, all gradients once a step; or
    of shards `passing`, each layer gathered twice and its gradients added up, for a micro-batch,
    `root` the same of what is outside of the layers, and `gather`, that gathered once a step.
    """
    if job.training.world.alone:
        return {}
    shards = job.training.grad_sync.sharded
    if shards is None:
        found = {"reduce": timed(job.training.world, job.training.grad_sync.sync_gradients)}
        job.training.optimizer.zero_grad()
        return found
    layers = [
        sum(p.numel() for p in layer.parameters()) for layer in job.training.model.decoder.layers
    ]
    root = sum(p.numel() for p in job.training.model.parameters()) - sum(layers)
    gather, add = (
        timed(job.training.world, act) for act in exchanges(job.training.world.size, layers[0])
    )
    root_gather, root_add = (
        timed(job.training.world, act) for act in exchanges(job.training.world.size, root)
    )
    return {
        "passing": len(layers) * (2 * gather + add), "root": root_add, "gather": root_gather,
    }  # fmt: skip


def exchanges(ranks: int, size: int) -> tuple[Any, Any]:
    """Gathering so many float32 elements of which each rank has a part, and adding them up."""
    import torch
    import torch.distributed as dist

    part = torch.zeros(-(-size // ranks))
    whole = torch.zeros(len(part) * ranks)
    return (
        lambda: dist.all_gather_single(whole, part),
        lambda: dist.reduce_scatter_single(part, whole),
    )


def timed(ranks: Any, act: Any) -> float:
    """Seconds, the middle of five, all ranks beginning together."""
    seconds: list[float] = []
    for _ in range(6):
        ranks.meet()
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def expected(one: dict[str, Any], case: str) -> float:
    """Seconds of a step on two ranks, from what was measured apart."""
    alone, rank = one["none-1"][0], one[case][0]
    update = statistics.median(alone["optimizer"])
    computing = (statistics.median(alone["seconds"]) - update) * rank["slowest"]
    if "reduce" in rank:
        return computing + update + rank["reduce"]
    rounds = -(-rank["cut"]["micro_batches"] // 2)
    sent = rounds * (rank["passing"] + rank["root"]) + rank["gather"]
    return computing + update / 2 + sent


def cut(job: Any) -> dict[str, int]:
    """Micro-batches of the first step on all ranks, and the tokens they compute."""
    from tunesmith.train.microbatches import plan_for_ranks

    documents = [job.data.documents[int(n)] for n in job.data.sampler.step_indices(0)]
    plans = plan_for_ranks(
        documents,
        job.training.world.size,
        work_model=job.microbatching.work,
        micro_tokens=job.microbatching.micro_tokens,
        share_prefixes=job.microbatching.share_prefixes,
    )
    return {"micro_batches": len(plans), "tokens": sum(plan.tokens for plan in plans)}


def inputs(folder: Path, arguments: argparse.Namespace) -> None:
    """A random llama and random documents of the calendar kind of length."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(arguments.vocabulary - 1)}
    words["<end>"] = arguments.vocabulary - 1
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary, hidden_size=arguments.width, eos_token_id=len(words) - 1,
        intermediate_size=arguments.width * 8 // 3, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64, num_key_value_heads=arguments.width // 64,
        bos_token_id=None, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chance = random.Random(0)
    rows = []
    for _ in range(arguments.documents * (arguments.steps + 1)):
        length = chance.randint(48, 144)
        text = " ".join(f"w{chance.randrange(arguments.vocabulary - 1)}" for _ in range(length))
        rows.append(json.dumps({"text": text}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")


def run(folder: Path, shard: str, ranks: int, arguments: argparse.Namespace) -> list[Any]:
    """One case in fresh processes; the records of its ranks."""
    given = vars(arguments)
    names = ("documents", "steps", "micro_tokens")
    options = [word for name in names for word in (f"--{name.replace('_', '-')}", str(given[name]))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [__file__, "--worker", str(folder), "--shard", shard, *options]
    command = [sys.executable, *(launcher if ranks > 1 else []), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TUNESMITH_CACHE": str(folder / "cache")}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    files = [folder / f"{shard}-{ranks}-{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files]


def summary(rounds: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The page."""

    def step(one: dict[str, Any], case: str) -> float:
        return statistics.median(one[case][0]["seconds"])

    def middle(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    first = rounds[0]
    cases = [f"{shard}-{ranks}" for shard, ranks in CASES]
    parameters = first[cases[0]][0]["bytes"]["parameters"]
    lines = [
        "# Several ranks on one machine",
        "",
        f"A random llama of {parameters:,} parameters in float32 with AdamW, "
        f"{arguments.documents} documents a step in micro-batches of at most "
        f"{arguments.micro_tokens} tokens. {os.cpu_count()} cores, one thread a rank, gloo. "
        f"{len(rounds)} rounds of {arguments.steps} timed steps; middle value, least and largest.",
        "",
        "| shard | ranks | seconds a step | expected from parts | micro-batches a step |",
        "|---|---|---|---|---|",
    ]
    for (shard, ranks), case in zip(CASES, cases, strict=True):
        if ranks <= TIMED:
            seconds = middle([step(one, case) for one in rounds])
            count = first[case][0]["cut"]["micro_batches"]
            parts = middle([expected(one, case) for one in rounds]) if ranks > 1 else ""
            lines.append(f"| {shard} | {ranks} | {seconds} | {parts} | {count} |")
    efficiency = [step(one, "none-1") / 2 / step(one, "none-2") for one in rounds]
    foreseen = [step(one, "none-1") / 2 / expected(one, "none-2") for one in rounds]
    overhead = [step(one, "full-2") / step(one, "none-2") for one in rounds]
    against = [2 * step(one, "full-2") / step(one, "none-1") for one in rounds]
    lines += [
        "",
        f"- Two ranks against one, time of one / (2 x time of two): {middle(efficiency)}; "
        f"expected from parts {middle(foreseen)}.",
        f"- `full` on two ranks takes {middle(overhead)} times what `none` takes on two.",
        f"- `full` on two ranks against one process, its time x 2 / time of one: "
        f"{middle(against)}.",
        "",
        "*Expected from parts* is computed: the time that one process computes, by the share of "
        "the work that the ranks wait for, the optimizer's time, and messages of the model's sizes "
        "timed by themselves. It leaves out that two processes share caches and memory.",
        "",
        "Bytes a parameter that the rank with most holds between steps; computed is 16 / ranks "
        "for `full`.",
        "",
        "| shard | ranks | weights | gradients | optimizer | sum | computed |",
        "|---|---|---|---|---|---|---|",
    ]
    for (shard, ranks), case in zip(CASES, cases, strict=True):
        kinds = ("weights", "gradients", "optimizer")
        most = max((r["bytes"] for r in first[case]), key=lambda b: sum(b[kind] for kind in kinds))
        each = [most[kind] / parameters for kind in kinds]
        computed = 16 / ranks if shard == "full" else 16
        shown = " | ".join(f"{value:.3f}" for value in [*each, sum(each), computed])
        lines.append(f"| {shard} | {ranks} | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (
        ("layers", 8), ("width", 384), ("vocabulary", 8192), ("documents", 12), ("steps", 3),
        ("micro-tokens", 256), ("rounds", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--results", type=Path, default=RESULTS / "scale.md")
    parser.add_argument("--worker")
    parser.add_argument("--shard", default="none")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    rounds: list[dict[str, Any]] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs(folder, arguments)
        for number in range(arguments.rounds):
            cases = [case for case in CASES if case[1] <= TIMED or number == 0]
            rounds.append({f"{s}-{n}": run(folder, s, n, arguments) for s, n in cases})
    page = summary(rounds, arguments)
    arguments.results.write_text(page)
    record = {"rounds": rounds, "seconds": time.monotonic() - started}
    arguments.results.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
