"""Does the doctor find what is planted, leave clean data alone, and how long does it take?

    python benchmarks/doctor.py --model MODEL --gsm8k FOLDER --oasst FILE

The planted corpus is the one of the tests. Clean are GSM8K (train against test) and a file of
human chats. For the time, rows are GSM8K's and two-turn chats made of its pairs, 10,000 in all, in
a fresh process. Writes results/doctor.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROWS = 10_000
COLUMNS = "data.columns={prompt: question, completion: answer}"


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def examine(*arguments: str) -> dict[str, Any]:
    """What `tunesmith doctor` prints, with its wall time in seconds, start and all."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "tunesmith", "doctor", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode == 2 or not done.stdout:
        raise SystemExit(done.stderr)
    return {"seconds": seconds, **json.loads(done.stdout)}


def summary(page: dict[str, Any]) -> dict[str, Any]:
    """Rows, time, and the checks that are not fine."""
    raised = [check for check in page["checks"] if check["level"] != "ok"]
    keys = ("check", "level", "count", "of")
    return {
        "rows": page["summary"]["rows"] + sum(page["summary"]["held_out"].values()),
        "tokens": page["summary"]["tokens"],
        "seconds": page["seconds"],
        "checks": len(page["checks"]),
        "raised": [{key: check[key] for key in keys} for check in raised],
    }


def many_rows(folder: Path, gsm8k: Path) -> Path:
    """ROWS rows of school arithmetic: all there are, then chats of two of them each."""
    given = [*read(gsm8k / "train.jsonl"), *read(gsm8k / "test.jsonl")]
    chats = []
    for at in range(ROWS - len(given)):
        turns = []
        for row in given[2 * at : 2 * at + 2]:
            turns.append({"role": "user", "content": row["question"]})
            turns.append({"role": "assistant", "content": row["answer"]})
        chats.append({"messages": turns})
    single = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in given
    ]
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*single, *chats]), encoding="utf-8")
    return path


def planted_faults(folder: Path) -> list[dict[str, Any]]:
    """Each check with the rows planted for it, those found, and those found wrongly."""
    sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "doctor")]
    import planted as made

    rows = made.planted()
    model = made.write_model(folder / "model")
    files = [
        made.write_lines(folder / "train.jsonl", rows.train),
        made.write_lines(folder / "eval.jsonl", rows.held_out),
    ]
    page = examine("--model", str(model), "--data", str(files[0]), "--eval", str(files[1]))
    table = []
    for check in page["checks"]:
        found = {
            f"{Path(place).stem}:{row}"
            for place, _, row in (hit["where"].rpartition(":") for hit in check["examples"])
        }
        wanted = rows.expected.get(check["check"])
        if wanted is not None:
            table.append(
                {
                    "check": check["check"],
                    "title": check["title"],
                    "planted": len(wanted),
                    "found": len(wanted & found),
                    "wrongly": len(found - wanted),
                }
            )
    return table


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        "# The doctor",
        "",
        f"Measured with `python benchmarks/doctor.py` on {machine['cores']} cores"
        f" ({machine['processor']}), Python {machine['python']}; the tokenizer is SmolLM2's. Times"
        " are of the whole command in a fresh process.",
        "",
        "| data | rows | tokens to train on | seconds | errors | warnings | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in results["runs"].items():
        counts = [
            sum(check["level"] == level for check in run["raised"])
            for level in ("error", "warning", "info")
        ]
        notes = ", ".join(check["check"] for check in run["raised"] if check["level"] == "info")
        shown = f"{counts[2]} ({notes})" if notes else "0"
        lines.append(
            f"| {name} | {run['rows']:,} | {run['tokens']:,} | {run['seconds']:.1f} |"
            f" {counts[0]} | {counts[1]} | {shown} |"
        )
    lines += [
        "",
        "The 10,000 rows are GSM8K's and chats of two of them each; a chat with one long and one"
        " short half is nearly the long one, which the check of near duplicates notes.",
        "",
        "Planted faults: one corpus in which the rows listed have the fault and no others do.",
        "",
        "| check | looks for | planted | found | wrongly |",
        "|---|---|---|---|---|",
    ]
    columns = ("check", "title", "planted", "found", "wrongly")
    lines += [
        f"| {' | '.join(str(row[column]) for column in columns)} |" for row in results["planted"]
    ]
    total = [sum(row[key] for row in results["planted"]) for key in ("planted", "found", "wrongly")]
    lines.append(f"| all | | {total[0]} | {total[1]} | {total[2]} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k", required=True, type=Path)
    parser.add_argument("--oasst", required=True, type=Path)
    options = parser.parse_args()
    model = ("--model", options.model)
    train, test = options.gsm8k / "train.jsonl", options.gsm8k / "test.jsonl"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            "GSM8K, train against test": examine(
                *model, "--data", str(train), "--eval", str(test), COLUMNS
            ),
            "oasst, human chats": examine(*model, "--data", str(options.oasst)),
            "10,000 rows": examine(*model, "--data", str(many_rows(folder, options.gsm8k))),
        }
        results = {
            "machine": {
                "processor": processor(),
                "cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(),
            },
            "runs": {title: summary(page) for title, page in runs.items()},
            "planted": planted_faults(folder),
        }
    (HERE / "results" / "doctor.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (HERE / "results" / "doctor.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
