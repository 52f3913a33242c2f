"""The plainest loop there is, timed like tunesmith_run.py: one document at a time, all its logits.

    python benchmarks/plain_run.py '{"model": M, "rows": F, "documents": 8, "lr": 1e-4,
                                     "warmup": 1, "threads": 2}'

transformers' model, cross entropy and torch's AdamW. Rows have `prompt` and `completion`, lists of
messages. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train once over the rows, in their order."""
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0)
    with open(job["rows"], encoding="utf-8") as file:
        documents = [document(tokenizer, json.loads(line)) for line in file]
    losses, tokens, seconds = [], [], []
    for first in range(0, len(documents), job["documents"]):
        chunk = documents[first : first + job["documents"]]
        begin = time.perf_counter()
        losses.append(step(model, optimizer, chunk))
        seconds.append(time.perf_counter() - begin)
        tokens.append(sum(len(ids) for ids, _ in chunk))
    warmup = job["warmup"]
    return {
        "tokens": sum(tokens[warmup:]),
        "computed_tokens": sum(tokens[warmup:]),
        "seconds": sum(seconds[warmup:]),
        "tokens_per_second": sum(tokens[warmup:]) / sum(seconds[warmup:]),
        "losses": losses,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def document(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """Ids up to the stop token, and how many of them are the prompt's."""
    more = {"tools": row.get("tools"), "return_dict": False}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **more)
    full = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **more)
    stop = full.index(tokenizer.eos_token_id, len(prompt))
    return full[: stop + 1], len(prompt)


def step(model: Any, optimizer: Any, documents: list[tuple[list[int], int]]) -> float:
    """One optimizer step over the mean of all targets; returns that mean."""
    total = sum(len(ids) - prompt for ids, prompt in documents)
    summed = 0.0
    for ids, prompt in documents:
        labels = [-100] * prompt + ids[prompt:]
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum"
        )
        (loss / total).backward()
        summed += float(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return summed / total


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
