"""A tiny model that has learned a few answers by heart, by plain torch alone, and those as data."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

from tiny import tiny_folder

PAIRS = [
    ("What is 1 plus 2?", "three"),
    ("What is 4 plus 4?", "it is eight"),
    ("Say yes.", "yes, yes"),
    ("Name a colour.", "blue"),
]
UNLEARNED = ("Say no.", "never before seen")


def chat_rows(pairs=PAIRS) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]


def answering_folder(folder: Path, *, raw: bool = False) -> Path:
    """A model folder whose greedy answers to PAIRS are theirs; `raw`: without a chat template."""
    shutil.copytree(_trained(raw), folder)
    return folder


@functools.cache
def _trained(raw: bool) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder(Path(tempfile.mkdtemp()) / "model")
    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    examples = [_ids(tokenizer, question, answer, raw) for question, answer in PAIRS]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        for ids, prompt in examples:
            labels = torch.tensor([[-100] * prompt + ids[prompt:]])
            model(input_ids=torch.tensor([ids]), labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def _ids(tokenizer, question: str, answer: str, raw: bool) -> tuple[list[int], int]:
    if raw:
        prompt = question
    else:
        turn = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return [*before, *after, tokenizer.eos_token_id], len(before)
