"""Fine-tune SmolLM2-135M-Instruct on the calendar task and show what it answers before and after.

    python examples/demo.py [section.key=value ...]      # changes of examples/calendar.yaml

Every figure of the table is computed in this run; answers are generated greedily on rows that the
training set does not have.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(".cache")  # everything below ROOT, where the commands run
MODEL, DATA, RUN = CACHE / "smollm2", CACHE / "calendar", Path("runs/demo")
TUNESMITH = [sys.executable, "-m", "tunesmith"]


def run(*command: str | Path) -> None:
    """Run a command from the repository, its output shown."""
    print("$", " ".join(_shown(part) for part in command), flush=True)
    code = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def evaluate(model: Path) -> dict[str, Any]:
    """Loss and exact match on the test rows."""
    command = [*TUNESMITH, "eval", str(model), "--data", str(DATA / "test.jsonl"), "--json"]
    command += ["--max-new-tokens", "80"]
    print("$", " ".join(_shown(part) for part in command), flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def _shown(part: str | Path) -> str:
    text = str(part)
    return "python" if text == sys.executable else text


def main(overrides: list[str]) -> None:
    run(sys.executable, "examples/smollm2.py", MODEL)
    run(sys.executable, "examples/calendar_events.py", DATA)
    before = evaluate(MODEL)
    run(
        *[*TUNESMITH, "train", "examples/calendar.yaml", "--out", RUN, "--overwrite"],
        *overrides,
    )
    after = evaluate(RUN)
    lines = (ROOT / RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(json.loads, lines) if step["kind"] == "train"]
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    rows = [
        ("", "before", "after"),
        ("exact match of unseen rows", *(f"{r['exact_match']:.1%}" for r in (before, after))),
        ("eval loss (nats a token)", *(f"{r['nll']:.4f}" for r in (before, after))),
    ]
    print()
    for row in rows:
        print("{:<28}{:>10}{:>10}".format(*row))
    print(f"\n{'training':<28}{tokens / seconds:,.0f} tokens/s, {seconds:,.0f} s")
    print(f"{'model':<28}{RUN / 'model'}")
    print(f"{'report':<28}{RUN / 'report.html'}")


if __name__ == "__main__":
    main(sys.argv[1:])
