"""Speed and memory of several ranks on this machine, against one.

    python benchmarks/scale.py          # writes results/scale.json and scale.md

A random model of `--layers` layers learns from random documents. Every rank has one thread, so that
two ranks have twice the cores of one; each step is the same for all, and steps are timed after one
that warms up. Cases run in turn, each in fresh processes, `--rounds` times, and a ratio is taken
inside a round. Memory is what the tensors of a rank hold: weights, gradients, optimizer.
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

    from tunesmith.config.read import read_recipe
    from tunesmith.distributed.ranks import connect
    from tunesmith.train.build import build
    from tunesmith.train.trainer import Trainer

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
    job = build(recipe, ranks=ranks)
    seconds: list[float] = []

    class Clock:
        def write(self, record: Any) -> None:
            if record["kind"] == "train":
                seconds.append(record["seconds"])

        def close(self) -> None: ...

    trainer = Trainer(job, folder, [Clock()])
    kept = held(job)
    note_gradients(job, kept)
    for _ in range(arguments.steps + 1):
        trainer._one_step()
    record = {"rank": ranks.rank, "bytes": kept, "seconds": seconds[1:], "cut": cut(job)}
    (folder / f"{arguments.shard}-{ranks.count}-{ranks.rank}.json").write_text(json.dumps(record))
    ranks.close()


def held(job: Any) -> dict[str, int]:
    """Bytes of this rank's weights, gradients and optimizer between steps."""
    import torch

    def size(tensors: Any) -> int:
        local = [getattr(t, "_local_tensor", t) for t in tensors]
        found = {t.data_ptr(): t.numel() * t.element_size() for t in local if t.numel()}
        return sum(found.values())

    state = [t for slot in job.optimizer._slots.values() for t in slot.state.values()]
    weights = [p.detach() for p in job.model.parameters()]
    return {
        "weights": size(weights),
        "optimizer": size(state),
        "parameters": sum(p.numel() for p in job.model.parameters()),
        "threads": torch.get_num_threads(),
    }


def note_gradients(job: Any, kept: dict[str, int]) -> None:
    """Have the bytes of the gradients that a step hands to the optimizer noted."""
    clip = job.optimizer.clip_grad_norm

    def noted(limit: float | None) -> Any:
        grads = [p.grad for p in job.optimizer.parameters if p.grad is not None]
        kept["gradients"] = sum(grad.numel() * grad.element_size() for grad in grads)
        return clip(limit)

    job.optimizer.clip_grad_norm = noted


def cut(job: Any) -> dict[str, int]:
    """Micro-batches of the first step on all ranks, and the tokens they compute."""
    from tunesmith.train.dealt import plan_for_ranks

    documents = [job.documents[int(n)] for n in job.order.step_indices(0)]
    plans = plan_for_ranks(
        documents, job.ranks.count, costs=job.costs, micro_tokens=job.micro_tokens, share=job.share
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
        "| shard | ranks | seconds a step | micro-batches a step |",
        "|---|---|---|---|",
    ]
    for (shard, ranks), case in zip(CASES, cases, strict=True):
        if ranks <= TIMED:
            seconds = middle([step(one, case) for one in rounds])
            lines.append(
                f"| {shard} | {ranks} | {seconds} | {first[case][0]['cut']['micro_batches']} |"
            )
    efficiency = [step(one, "none-1") / 2 / step(one, "none-2") for one in rounds]
    overhead = [step(one, "full-2") / step(one, "none-2") for one in rounds]
    against = [2 * step(one, "full-2") / step(one, "none-1") for one in rounds]
    lines += [
        "",
        f"- Two ranks against one, time of one / (2 x time of two): {middle(efficiency)}.",
        f"- `full` on two ranks takes {middle(overhead)} times what `none` takes on two.",
        f"- `full` on two ranks against one process, its time x 2 / time of one: "
        f"{middle(against)}.",
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
