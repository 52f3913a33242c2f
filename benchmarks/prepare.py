"""Rows a second of preparation, Tunesmith and TRL in turn; the second start; memory of long files.

    python benchmarks/prepare.py --model MODEL --gsm8k train.jsonl
    python benchmarks/prepare.py --model MODEL --gsm8k train.jsonl --tools sgd.jsonl --chat QWEN3
    python benchmarks/prepare.py --model MODEL --gsm8k train.jsonl --long 5 --only long

Each run is a fresh process that makes documents (TRL: tokenised rows with labels) out of rows that
it has to read from disk; the time is that of the preparation alone, imports and tokenizer apart.
TRL prepares with as many processes as the machine has cores, and with one; its faster time counts.
`--chat` is Qwen3's tokenizer, for rows with tools; there Tunesmith renders every turn as inference
will see it. TRL renders a chat once, or, for the same outcome, is given a row for every turn.
Ids and labels are compared turn by turn, but for what the template writes after a stop token.
`--long` also prepares GiB of text, repeated rows under changing numbers, and writes down the
largest memory of a process, and the time of a second start. Writes results/prepare.json and .md;
what `--only` leaves out stays as it was.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = "tunesmith"


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Prepare with Tunesmith; with `cache`, documents are kept there or taken from it."""
    from tunesmith.data.preprocess.prepare import prepare
    from tunesmith.data.sources.sources import Source
    from tunesmith.data.templates.load import load_template

    template = load_template(job["tokenizer"], template=job.get("template"))
    source = Source("rows", path=Path(job["rows"]))
    cache = Path(job["cache"]) if job.get("cache") else None
    begin = time.perf_counter()
    processes = job.get("processes")
    prepared = prepare([source], template, max_length=None, cache=cache, processes=processes)
    seconds = time.perf_counter() - begin
    compared = prepared.documents[: job.get("compared", 0)]
    return {
        "seconds": seconds,
        "rows": len(prepared.documents),
        "turns": [turn for document in compared for turn in turns_of(document)],
    }


def turns_of(document: Any) -> list[str]:
    """A hash for each learned turn: of the ids up to its end, and of which are its targets."""
    found: dict[int, str] = {}
    for segment in document.segments:
        for message in sorted(set(segment.message.tolist())):
            own = segment.index[segment.message == message]
            ids, marks = segment.ids[: own[-1] + 1].tolist(), [0] * (int(own[-1]) + 1)
            for at in own.tolist():
                marks[at] = 1
            above = segment
            while above.parent >= 0:
                above = document.segments[above.parent]
                marked = set(above.index[above.message == message].tolist())
                marks = [int(at in marked) for at in range(len(above.ids))] + marks
                ids = above.ids.tolist() + ids
            found[message] = digest(ids, marks)  # of a turn in two segments the later one counts
    return [found[message] for message in sorted(found)]


def digest(ids: list[int], marks: list[int]) -> str:
    return hashlib.sha256(json.dumps([ids, marks]).encode()).hexdigest()[:16]


def trl(job: dict[str, Any]) -> dict[str, Any]:
    """Prepare with TRL's SFTTrainer around a model of the least size."""
    import transformers
    import trl as library
    from datasets import Dataset, disable_caching
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    disable_caching()
    transformers.logging.set_verbosity_error()
    spent: list[float] = []

    class Timed(library.SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            dataset = super()._prepare_dataset(*args, **kwargs)
            spent.append(time.perf_counter() - begin)
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    if job.get("template"):
        tokenizer.chat_template = Path(job["template"]).read_text(encoding="utf-8")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=1, num_key_value_heads=1, **sizes
    )
    with open(job["rows"], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        if "tools" in row:  # as a string, since Arrow would give every tool the keys of all others
            row["tools"] = json.dumps(row["tools"])
        for message in row.get("messages", ()):  # so would the arguments of calls
            for call in message.get("tool_calls") or ():
                inner = call.get("function", call)
                inner["arguments"] = json.dumps(inner["arguments"], ensure_ascii=False)
    count = len(rows)
    if job.get("per_turn"):
        rows = [turn for row in rows for turn in per_turn(row)]
    begin = time.perf_counter()
    dataset = Dataset.from_list(rows)
    reading = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=LlamaForCausalLM(config),
            args=library.SFTConfig(
                output_dir=folder,
                max_length=None,
                dataset_num_proc=job["processes"] if job["processes"] > 1 else None,
                assistant_only_loss="messages" in rows[0],
                report_to="none",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
    ready = trainer.train_dataset
    compared = len(ready) if job.get("per_turn") else min(job.get("compared", 0), len(ready))
    turns: list[str] = []
    for at in range(compared):
        ids = ready[at]["input_ids"]
        marks = [int(label != -100) for label in ready[at]["labels"]]
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
        turns.append(digest(ids[:end], marks[:end]))
    return {"seconds": spent[0] + reading, "rows": count, "turns": turns}


def per_turn(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each answer of a chat, in the context it is given in: what Tunesmith learns."""
    messages = row["messages"]
    return [
        {"prompt": messages[:at], "completion": [message], "tools": row["tools"]}
        for at, message in enumerate(messages)
        if message["role"] == "assistant" and at
    ]


def run_peer(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """One run in its own process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--peer", name, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: {name}\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    rate = result["rows"] / result["seconds"]
    print(f"{name:<12} {rate:10,.1f} rows/s  {json.dumps(job)}", file=sys.stderr, flush=True)
    return {**result, "rate": rate}


def chats(data: Path, out: Path) -> Path:
    """GSM8K's questions and answers as prompts and completions of one message."""
    with data.open(encoding="utf-8") as file, out.open("w", encoding="utf-8") as target:
        for line in file:
            row = json.loads(line)
            chat = {
                "prompt": [{"role": "user", "content": row["question"]}],
                "completion": [{"role": "assistant", "content": row["answer"]}],
            }
            target.write(json.dumps(chat) + "\n")
    return out


def compare(job: dict[str, Any], rounds: int, folder: Path) -> dict[str, Any]:
    """Both in turn, then Tunesmith with a cache that is empty and one that is filled."""
    cores = os.cpu_count() or 1
    alone: list[dict[str, Any]] = []
    mine: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    by_processes: list[list[float]] = []
    for _ in range(rounds):
        mine.append(run_peer(OURS, job))
        alone.append(run_peer(OURS, {**job, "processes": 1}))
        tries = [run_peer("trl", {**job, "processes": n}) for n in sorted({1, cores})]
        theirs.append(max(tries, key=lambda run: run["rate"]))
        by_processes.append([run["rate"] for run in tries])
    kept = {**job, "cache": str(folder / "cache")}
    filling, second = run_peer(OURS, kept), run_peer(OURS, kept)
    return {
        "rows": mine[0]["rows"],
        "rounds": rounds,
        "tunesmith_rows_per_second": spread([run["rate"] for run in mine]),
        "tunesmith_one_process": spread([run["rate"] for run in alone]),
        "trl_rows_per_second": spread([run["rate"] for run in theirs]),
        "trl_by_processes": by_processes,
        "tunesmith_faster": spread(
            [a["rate"] / b["rate"] for a, b in zip(mine, theirs, strict=True)]
        ),
        "filling_the_cache_seconds": filling["seconds"],
        "second_start_seconds": second["seconds"],
        "turns_compared": len(mine[0]["turns"]),
        "turns_that_agree": (Counter(mine[0]["turns"]) & Counter(theirs[0]["turns"])).total(),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def write_long(rows: Path, out: Path, gib: float) -> int:
    """Rows again and again under changing numbers until the file has so many GiB; how many rows."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    count, size, target = 0, 0, int(gib * 2**30)
    with out.open("w", encoding="utf-8") as file:
        while size < target:
            row = lines[count % len(lines)]
            asked = f"Question {count}. " + row["prompt"][0]["content"] * 8
            chat = {**row, "prompt": [{"role": "user", "content": asked}]}
            size += file.write(json.dumps(chat) + "\n")
            count += 1
    return count


def long(rows: Path, tokenizer: str, gib: float, folder: Path) -> dict[str, Any]:
    """Largest memory of this process's children over a long file and over a tenth of it."""
    found: dict[str, Any] = {"gib": gib}
    for name, part in (("tenth", gib / 10), ("whole", gib)):
        path = folder / f"{name}.jsonl"
        found[f"{name}_rows"] = write_long(rows, path, part)
        job = {"rows": str(path), "tokenizer": tokenizer, "cache": str(folder / f"cache-{name}")}
        result = run_peer("measured", job)
        found[f"{name}_seconds"] = result["seconds"]
        found[f"{name}_peak"] = result["peak"]
        found[f"{name}_second_start_seconds"] = run_peer("measured", job)["seconds"]
        path.unlink()
    return found


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """`ours`, with the largest memory that this process or one of its workers held.

    Pages of files that are mapped into memory count only where the system has kept them.
    """
    result = ours(job)
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return {**result, "peak": max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024}


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['processor']}, {results['cores']} cores, Python {results['python']}; "
        f"TRL {results['trl']}; smallest, median and largest of so many rounds.",
        "",
        "| data | rows | rounds | Tunesmith, rows/s | with one process | TRL, rows/s |"
        " Tunesmith is faster by | with an empty cache | from the cache |"
        " turns with the same ids and labels |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        if isinstance(one, dict) and "trl_rows_per_second" in one:
            lines.append(
                f"| {name} | {one['rows']:,} | {one['rounds']} |"
                f" {shown(one['tunesmith_rows_per_second'], ',.0f')} |"
                f" {shown(one['tunesmith_one_process'], ',.0f')} |"
                f" {shown(one['trl_rows_per_second'], ',.1f')} |"
                f" {shown(one['tunesmith_faster'], '.1f')} |"
                f" {one['filling_the_cache_seconds']:.2f} s | {one['second_start_seconds']:.2f} s |"
                f" {same_turns(one)} |"
            )
    if "long" in results:
        one = results["long"]
        lines += [
            "",
            f"A file of {one['gib']:g} GiB, {one['whole_rows']:,} rows:"
            f" {one['whole_seconds']:.0f} s, at most {one['whole_peak'] / 2**30:.2f} GiB of memory;"
            f" a tenth of it: {one['tenth_peak'] / 2**30:.2f} GiB. From the cache:"
            f" {one['whole_second_start_seconds']:.2f} s.",
        ]
    return "\n".join(lines) + "\n"


def same_turns(one: dict[str, Any]) -> str:
    if not one["turns_compared"]:
        return "TRL's turns stand in another context"
    return f"{one['turns_that_agree']:,} of {one['turns_compared']:,}"


def shown(values: dict[str, float], form: str) -> str:
    return " - ".join(format(values[name], form) for name in ("min", "median", "max"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder with a tokenizer, for GSM8K")
    parser.add_argument("--gsm8k", type=Path, required=True, help="rows of question and answer")
    parser.add_argument("--tools", type=Path, help="rows of messages and tools")
    parser.add_argument("--chat", help="folder with the tokenizer of Qwen3")
    parser.add_argument("--long", type=float, help="GiB of a long file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="parts to measure: gsm8k, tools, turns, long, by commas")
    parser.add_argument("--turn-chats", type=int, default=60, help="chats given a row for a turn")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    from importlib import resources
    from importlib.metadata import version

    parts = set((arguments.only or "gsm8k,tools,turns,long").split(","))
    kept = arguments.out / "prepare.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    results |= {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "trl": version("trl"),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = chats(arguments.gsm8k, folder / "gsm8k.jsonl")
        if "gsm8k" in parts:
            job = {"rows": str(rows), "tokenizer": arguments.model, "compared": 10**6}
            results["gsm8k"] = compare(job, arguments.rounds, folder)
        if arguments.tools and arguments.chat:
            # TRL makes masks for the templates it knows, which it compares by their text.
            qwen = str(resources.files("trl") / "chat_templates" / "qwen3.jinja")
            job = {"rows": str(arguments.tools), "tokenizer": arguments.chat, "template": qwen}
            if "tools" in parts:
                results["tools"] = compare(job, arguments.rounds, folder)
            if "turns" in parts:
                some = folder / "some.jsonl"
                with arguments.tools.open(encoding="utf-8") as file:
                    some.write_text("".join(itertools.islice(file, arguments.turn_chats)))
                turns = {**job, "rows": str(some), "per_turn": True, "compared": 10**6}
                results["tools, a row a turn"] = compare(turns, 1, folder)
        if arguments.long and "long" in parts:
            results["long"] = long(rows, arguments.model, arguments.long, folder)
    text = table(results)
    kept.write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "prepare.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peers = {OURS: ours, "trl": trl, "measured": measured}
        print(json.dumps(peers[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        main()
