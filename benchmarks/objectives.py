"""Objectives compared on GSM8K with one small model, on equal budgets.

    python benchmarks/objectives.py --model MODEL --gsm8k FOLDER --oasst messages.jsonl

Each objective trains the same rows in the same order, for the same steps at the same rate. Then:
loss and entropy on held-out problems (`eval` records of the run), the share of problems whose
number after `####` is right (`tunesmith generate`, greedy), and how far the model moved where it
was not trained: KL(base || tuned), nats a token, over the base's own greedy answers to the first
turns of oasst chats, by plain transformers.

What is done is kept in --work, so an interrupted study goes on. Writes results/objectives.json,
.md and .svg; what stands in the .md under CONCLUSIONS was written by a reader and stays.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OBJECTIVES: dict[str, dict[str, Any]] = {
    "nll": {"name": "nll"},
    "nll, smoothing 0.1": {"name": "nll", "label_smoothing": 0.1},
    "dft": {"name": "dft"},
    "eaft": {"name": "eaft"},
    "psft": {"name": "psft"},
    "asft": {"name": "asft"},
}
BASE = "untuned"
COLUMNS = "data.columns={prompt: question, completion: answer}"
CONCLUSIONS = "## What can and cannot be concluded"
NUMBER = re.compile(r"####\s*(-?[\d,.]+)")


def final_number(text: str) -> str | None:
    """The number after the last `####`, without thousands' commas and a final full stop."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def score(answers: Path) -> dict[str, float]:
    """Shares of the answers: the right number, a number in the asked form, an end of their own."""
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    pairs = [(final_number(row["generated"]), final_number(row["reference"])) for row in rows]
    return {
        "answers": len(rows),
        "exact_match": sum(found == wanted for found, wanted in pairs) / len(rows),
        "in_form": sum(found is not None for found, _ in pairs) / len(rows),
        "ended": sum(row["stopped"] for row in rows) / len(rows),
    }


def tunesmith(*arguments: str) -> None:
    """Run the command line; its words go where ours go."""
    if code := subprocess.run([sys.executable, "-m", "tunesmith", *arguments]).returncode:
        sys.exit(code)


def train(name: str, job: argparse.Namespace, run: Path) -> list[dict[str, Any]]:
    """The run's records."""
    own = [f"objective.{key}={value}" for key, value in OBJECTIVES[name].items()]
    tunesmith(
        *["train", "--model", job.model, "--data", str(job.gsm8k / "train.jsonl")],
        *["--eval", str(job.work / "loss.jsonl"), "--out", str(run), "--resume"],
        *[COLUMNS, f"batch.documents={job.documents}", f"train.steps={job.steps}"],
        *[f"optim.lr={job.lr}", "checkpoint.keep=1", *own],
    )
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def answer(model: str, job: argparse.Namespace, out: Path) -> dict[str, float]:
    """Greedy answers to the held-out problems, and what they are worth."""
    options = ["--data", str(job.work / "test.jsonl"), "--out", str(out), "--overwrite"]
    tunesmith("generate", model, *options, "--max-new-tokens", str(job.max_new_tokens), COLUMNS)
    return score(out)


def base_answers(job: argparse.Namespace) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) ids: what the untuned model says to the first turns of the chats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32")
    lines = job.oasst.read_text(encoding="utf-8").splitlines()[: job.chats]
    found: list[tuple[list[int], list[int]]] = []
    for line in lines:
        first = json.loads(line)["messages"][:1]
        prompt = tokenizer.apply_chat_template(first, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(),
                max_new_tokens=job.chat_tokens, do_sample=False,
            )  # fmt: skip
        found.append((list(prompt), ids[0, len(prompt) :].tolist()))
    return found


def divergence(
    base: str, tuned: str, said: Sequence[tuple[list[int], list[int]]]
) -> dict[str, float]:
    """KL(base || tuned) and the tuned model's entropy, means over the tokens of the answers."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(name, dtype="float32").eval() for name in (base, tuned)
    ]
    kl = entropy = 0.0
    tokens = sum(len(answer) for _, answer in said)
    for prompt, answer_ids in said:
        ids = torch.tensor([prompt + answer_ids])
        with torch.no_grad():
            first = len(prompt) - 1
            p, q = (m(ids).logits[0, first:-1].float().log_softmax(-1) for m in models)
        kl += float((p.exp() * (p - q)).sum())
        entropy -= float((q.exp() * q).sum())
    return {"kl_to_base": kl / tokens, "chat_entropy": entropy / tokens, "chat_tokens": tokens}


def study(job: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Everything measured, by objective; the untuned model first."""
    job.work.mkdir(parents=True, exist_ok=True)
    lines = (job.gsm8k / "test.jsonl").read_text(encoding="utf-8").splitlines()[: job.test]
    for name, rows in (("test", lines), ("loss", lines[: job.loss_rows])):
        (job.work / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    kept = job.work / "measured.json"
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}

    def keep(name: str, measured: dict[str, Any]) -> None:
        found[name] = measured
        kept.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(name, json.dumps(measured), flush=True)

    said_file = job.work / "said.json"
    if not said_file.exists():
        said_file.write_text(json.dumps(base_answers(job)), encoding="utf-8")
    said = [(prompt, answer_ids) for prompt, answer_ids in json.loads(said_file.read_text())]
    said = said[: job.chats]
    for name in job.only or OBJECTIVES:
        if name in found:
            continue
        run = job.work / re.sub(r"\W+", "-", name)
        records = train(name, job, run)
        held_out = [record for record in records if record["kind"] == "eval"]
        if BASE not in found:
            untuned = {key: held_out[0][key] for key in ("nll", "accuracy", "entropy")}
            alone = divergence(job.model, job.model, said)
            keep(BASE, {**untuned, **answer(job.model, job, job.work / "base.jsonl"), **alone})
        measured = {key: held_out[-1][key] for key in ("nll", "accuracy", "entropy")}
        measured |= answer(str(run), job, run / "answers.jsonl")
        measured |= divergence(job.model, str(run / "model"), said)
        keep(name, measured)
    return found


def table(found: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """The study as Markdown."""
    head = (
        f"{facts['steps']} steps of {facts['documents']} rows, lr {facts['lr']:g} for all,"
        f" one seed; loss on {facts['loss_rows']} held-out problems, answers to"
        f" {facts['test']} of at most {facts['max_new_tokens']} tokens;"
        f" {facts['chats']} oasst prompts.\n\n"
        "| objective | held-out NLL | token accuracy | entropy | right number | number in form"
        " | ended | KL(base \\|\\| tuned) on chats | entropy on chats |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = [
        f"| {name} | {m['nll']:.4f} | {m['accuracy']:.1%} | {m['entropy']:.3f}"
        f" | {within(m['exact_match'], m['answers'])} | {m['in_form']:.1%} | {m['ended']:.1%}"
        f" | {m['kl_to_base']:.4f} | {m['chat_entropy']:.3f} |"
        for name, m in found.items()
    ]
    return head + "\n".join(rows) + "\n"


def within(share: float, count: int) -> str:
    """A share with its standard error, sqrt(p (1 - p) / n)."""
    return f"{share:.1%} ± {(share * (1 - share) / count) ** 0.5:.1%}"


def conclusions(page: Path) -> str:
    """What a reader wrote under an earlier table."""
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    _, marker, after = before.partition(CONCLUSIONS)
    return f"\n{marker}{after}" if marker else ""


def plot(found: dict[str, dict[str, Any]]) -> str:
    """Held-out NLL against KL to the base on chats, as SVG: low and left is better."""
    width, height, pad = 640, 400, 60
    xs = [m["kl_to_base"] for m in found.values()]
    ys = [m["nll"] for m in found.values()]

    def place(value: float, values: list[float], size: int) -> float:
        low, high = min(values), max(values)
        return pad + (value - low) / ((high - low) or 1.0) * (size - 2 * pad)

    marks = []
    for name, m in found.items():
        x = place(m["kl_to_base"], xs, width)
        y = height - place(m["nll"], ys, height)
        side, dx = ("end", -8) if x > width / 2 else ("start", 8)
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#246"/>'
            f'<text x="{x + dx:.1f}" y="{y - 6:.1f}" text-anchor="{side}">{name}</text>'
        )
    ticks = [
        f'<text x="{pad}" y="{height - 30}" text-anchor="middle">{min(xs):.3f}</text>',
        f'<text x="{width - pad}" y="{height - 30}" text-anchor="middle">{max(xs):.3f}</text>',
        f'<text x="{pad - 15}" y="{height - pad}" text-anchor="end">{min(ys):.2f}</text>',
        f'<text x="{pad - 15}" y="{pad + 5}" text-anchor="end">{max(ys):.2f}</text>',
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">KL(base || tuned) on oasst'
        " prompts, nats a token</text>",
        f'<text x="{pad}" y="30">held-out NLL on GSM8K, nats a token</text>',
    ]
    frame = (
        f'<path d="M{pad - 10} {pad - 10}V{height - pad + 10}H{width - pad + 10}" fill="none"'
        ' stroke="#888"/>'
    )
    body = "\n".join([frame, *ticks, *marks])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' font-family="sans-serif" font-size="12">\n<rect width="{width}" height="{height}"'
        f' fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder of train and test.jsonl")
    parser.add_argument("--oasst", type=Path, required=True, help="JSONL rows with `messages`")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="kept there")
    parser.add_argument("--only", action="append", choices=OBJECTIVES, help="of the objectives")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--documents", type=int, default=8, help="rows a step (8)")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--test", type=int, default=200, help="held-out problems (200)")
    parser.add_argument("--loss-rows", type=int, default=100, help="of them, for the loss (100)")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--chats", type=int, default=50, help="oasst prompts (50)")
    parser.add_argument("--chat-tokens", type=int, default=64, help="of the base's answers (64)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    job = parser.parse_args()
    found = study(job)
    names = ("steps", "documents", "lr", "loss_rows", "test", "max_new_tokens", "chats")
    facts = {key: getattr(job, key) for key in names}
    job.out.mkdir(parents=True, exist_ok=True)
    path = job.out / "objectives.json"
    path.write_text(json.dumps({"facts": facts, "measured": found}, indent=1) + "\n")
    path.with_suffix(".svg").write_text(plot(found), encoding="utf-8")
    written = table(found, facts) + "\n![loss and drift](objectives.svg)\n"
    page = path.with_suffix(".md")
    page.write_text(written + conclusions(page), encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
