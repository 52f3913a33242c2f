"""Tokens a second and memory of Tunesmith and of TRL, measured in turn on one machine.

    python benchmarks/vs_trl.py --model MODEL --data ROWS.jsonl      # A B C A B C A B C
    python benchmarks/vs_trl.py --model MODEL --data ROWS.jsonl --search    # rank TRL's settings

Each run is a fresh process over the same rows in the same order, with the same documents a step,
AdamW (weight decay 0) at the same constant rate, completions as the only targets; full fine-tuning,
or LoRA of rank --lora on every linear map of the decoder. A token counts if it is not padding, one
that rows repeat as often as they do; time is that of the steps after the first. Ratios are taken
between runs of the same round, since a machine's speed drifts. Rows have `prompt` and
`completion`, or `question` and `answer`, or `messages`, which become a row an answer; without
--data the calendar example is used.

TRL runs with its defaults and with the fastest of the settings in trl_run.py. A search finds that
one, once for each processor: the precisions first, padded, then all ways to form batches at the
fastest precision. Where a setting changes which documents share a step (by length, packed), its
losses are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peer_rows import write_rows
from trl_run import PRECISIONS, SETTINGS, SHAPES

HERE = Path(__file__).resolve().parent
TUNESMITH = "tunesmith"
UNSHARED = "tunesmith, prefixes not shared"


def run_peer(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """One run in its own process."""
    script = "tunesmith_run.py" if name.startswith(TUNESMITH) else "trl_run.py"
    if name == UNSHARED:
        job = {**job, "device": {"share_prefixes": False}}
    command = [sys.executable, str(HERE / script), json.dumps({**job, "setting": name})]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(job["threads"]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"error: {name}\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{name:<46} {result['tokens_per_second']:8.1f} tokens/s"
        f" {result['peak_rss'] / 2**30:6.2f} GiB   first loss {result['losses'][0]:.5f}",
        file=sys.stderr,
        flush=True,
    )
    return result


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Min, median and max of each peer's speed, and of ours over its in the same round."""
    summary: dict[str, Any] = {}
    for name, done in runs.items():
        speeds = [run["tokens_per_second"] for run in done]
        entry: dict[str, Any] = {
            "tokens_per_second": _spread(speeds),
            "peak_rss": max(run["peak_rss"] for run in done),
            "first_loss": done[0]["losses"][0],
        }
        if name == TUNESMITH:
            entry["repeats"] = done[0]["tokens"] / done[0]["computed_tokens"]
        ours = runs.get(TUNESMITH)
        if ours and name != TUNESMITH:
            speeds_of_ours = [run["tokens_per_second"] for run in ours]
            pairs = zip(speeds_of_ours, speeds, strict=True)
            entry["tunesmith_faster"] = _spread([mine / theirs for mine, theirs in pairs])
            if done[0]["step_targets"] == ours[0]["step_targets"]:
                gaps = zip(ours[0]["losses"], done[0]["losses"], strict=True)
                entry["largest_loss_gap"] = max(abs(mine - theirs) for mine, theirs in gaps)
        summary[name] = entry
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def table(summary: dict[str, Any], facts: dict[str, Any]) -> str:
    """The summary as Markdown."""
    lines = [
        f"{facts['data']}: {facts['rows']} rows, {facts['documents']} a step, lr {facts['lr']:g};"
        f" {'LoRA of rank ' + str(facts['lora']) if facts['lora'] else 'all parameters'};"
        f" Tunesmith's dtype {facts['dtype']};"
        f" {facts['processor']}, {facts['threads']} threads; {facts['rounds']} rounds.",
        "",
        "| run | real tokens/s, min-median-max | peak memory | Tunesmith is faster by |"
        " first loss | largest gap of losses |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in summary.items():
        speed, ratio = entry["tokens_per_second"], entry.get("tunesmith_faster")
        gap = entry.get("largest_loss_gap")
        run = name if name.startswith(TUNESMITH) else f"TRL, {name}"
        lines.append(
            f"| {run} | {_range(speed, '.0f')} |"
            f" {entry['peak_rss'] / 2**30:.2f} GiB | {_range(ratio, '.2f') if ratio else ''} |"
            f" {entry['first_loss']:.5f} | {'' if gap is None else f'{gap:.5f}'} |"
        )
    repeats = summary.get(TUNESMITH, {}).get("repeats")
    if repeats:
        lines += ["", f"Tokens with repeats / tokens Tunesmith computed: {repeats:.2f}."]
    return "\n".join(lines) + "\n"


def _range(spread: dict[str, float], form: str) -> str:
    return " - ".join(format(spread[name], form) for name in ("min", "median", "max"))


def processor() -> str:
    """The processor's name and those vector units that decide on a precision, where known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = facts.get("flags", "").split()
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
    return " ".join([facts.get("model name", platform.processor()), *units])


def search(job: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """One run of TRL's defaults, of each precision, and of each shape at the fastest precision."""
    padded = {precision: f"{precision}, padded" for precision in PRECISIONS}
    runs = {name: [run_peer(name, job)] for name in ["default", *padded.values()]}
    fastest = max(PRECISIONS, key=lambda precision: _speed(runs[padded[precision]]))
    for shape in SHAPES:
        name = f"{fastest}, {shape}"
        if name not in runs:
            runs[name] = [run_peer(name, job)]
    return dict(sorted(runs.items(), key=lambda item: -_speed(item[1])))


def _speed(runs: list[dict[str, Any]]) -> float:
    return runs[0]["tokens_per_second"]


def searched_best(path: Path) -> str | None:
    """The fastest setting of an earlier search on this processor."""
    if not path.is_file():
        return None
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["facts"]["processor"] != processor():
        return None
    return next(name for name in report["summary"] if name != "default")


def write_report(stem: Path, facts: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Write the runs as JSON and their table as Markdown; print the table."""
    summary = summarize(runs)
    stem.parent.mkdir(parents=True, exist_ok=True)
    report = {"facts": facts, "summary": summary, "runs": runs}
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(table(summary, facts), encoding="utf-8")
    print(table(summary, facts))


def main() -> None:
    arguments = parse()
    count = arguments.documents * (arguments.steps + 1)
    settings = arguments.out / "trl_settings.json"
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        facts = {
            "data": write_rows(
                arguments.data, count, rows, answers=arguments.answers, tools=arguments.tools
            ),
            "lora": arguments.lora,
            "dtype": arguments.dtype,
            "rows": count,
            "documents": arguments.documents,
            "lr": arguments.lr,
            "rounds": arguments.rounds,
            "threads": arguments.threads,
            "processor": processor(),
            "python": platform.python_version(),
        }
        job = {
            "model": str(arguments.model),
            "rows": str(rows),
            "dtype": arguments.dtype,
            "lora": arguments.lora,
            "documents": arguments.documents,
            "lr": arguments.lr,
            "warmup": 1,
            "seed": 42,
            "threads": arguments.threads,
        }
        best = None if arguments.search else searched_best(settings)
        if arguments.search or not (best or arguments.trl):
            write_report(settings.with_suffix(""), {**facts, "rounds": 1}, search(job))
            best = searched_best(settings)
        if arguments.search:
            return
        own = [TUNESMITH, UNSHARED] if arguments.unshared else [TUNESMITH]
        names = [*own, *(arguments.trl or ("default", best))]
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                runs[name].append(run_peer(name, job))
    write_report(arguments.out / arguments.report, facts, runs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--data", type=Path, help="JSONL rows (default: the calendar example)")
    parser.add_argument("--documents", type=int, default=8, help="documents a step (default 8)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--lr", type=float, default=1e-4, help="constant rate (default 1e-4)")
    parser.add_argument("--trl", action="append", choices=SETTINGS, help="TRL settings to run")
    parser.add_argument("--dtype", default="auto", help="Tunesmith's model.dtype (default auto)")
    parser.add_argument("--answers", type=int, default=1, help="rows that share a prompt (1)")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all (default)")
    parser.add_argument(
        "--tools", choices=("template", "text"), default="template",
        help="the chats' tools: given to the template (default), or written into a system message",
    )  # fmt: skip
    parser.add_argument("--unshared", action="store_true", help="Tunesmith without sharing too")
    parser.add_argument("--report", default="vs_trl", help="name of the result files (vs_trl)")
    parser.add_argument("--search", action="store_true", help="rank the TRL settings, alone")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
