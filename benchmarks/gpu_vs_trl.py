"""Tunesmith against TRL on one GPU: random weights of real shapes, documents of 4,096 tokens.

    python benchmarks/gpu_vs_trl.py --tokenizer MODEL --text train.jsonl --case 1b --case 8b-lora
    python benchmarks/gpu_vs_trl.py --tokenizer MODEL --text train.jsonl --case tiny   # anywhere

The runs are those of `vs_trl.py`: each in a fresh process, in turn, the same rows in the same
order, losses compared step by step; peak memory is that of the GPU's allocator. TRL runs with
Liger's kernels (`pip install liger-kernel`), padding-free and packed to 4,096; where Liger is not
installed, without. `--own` also runs Tunesmith with its kernels and torch's compiler off and on. A
document is one question and answer after another, as turns of a chat, up to
the length.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from random_model import save_random
from trl_run import GPU
from vs_trl import TUNESMITH, run_peer, write_report

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
CASES = {"tiny": ("tiny", 0), "1b": ("1b", 0), "8b-lora": ("8b", 16)}
"""Name to shape and rank of LoRA; 0 trains all."""

OWN: dict[str, dict[str, str]] = {
    "tunesmith, torch's operations": {"kernels": "torch"},
    "tunesmith, Liger's kernels": {"kernels": "liger"},
    "tunesmith, compiled layers": {"compile": "layers"},
}
"""Settings of Tunesmith's device that `--own` tries beside its defaults."""


def write_model(tokenizer_folder: Path, shape: str, out: Path, *, length: int) -> None:
    """A Llama of random bfloat16 weights with a real tokenizer and its vocabulary."""
    from transformers import AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2 * length, rope_theta=500_000.0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, **SHAPES[shape],
    )  # fmt: skip
    save_random(config, tokenizer, out, dtype="bfloat16")


def write_rows(text: Path, tokenizer_folder: Path, out: Path, *, count: int, length: int) -> None:
    """Chats of about `length` tokens, of which the last answer is learned."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    given = iter(map(json.loads, text.read_text(encoding="utf-8").splitlines()))
    with out.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns: list[dict[str, str]] = []
            used = 0
            while used < 0.9 * length:
                row = next(given)
                asked = row.get("question", row.get("prompt"))
                told = row.get("answer", row.get("completion"))
                turns += [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": told},
                ]
                used += len(tokenizer(asked + told)["input_ids"]) + 12
            file.write(json.dumps({"prompt": turns[:-1], "completion": turns[-1:]}) + "\n")


def measure(case: str, options: argparse.Namespace, folder: Path) -> None:
    """Run one case and write its report."""
    shape, rank = CASES[case]
    model, rows = folder / "model", folder / "rows.jsonl"
    count = options.documents * (options.steps + 1)
    write_model(options.tokenizer, shape, model, length=options.length)
    write_rows(options.text, options.tokenizer, rows, count=count, length=options.length)
    job: dict[str, Any] = {
        "model": str(model), "rows": str(rows), "dtype": "bfloat16", "lora": rank,
        "documents": options.documents, "lr": 1e-5, "warmup": 1, "seed": 42,
        "threads": options.threads,
    }  # fmt: skip
    liger = find_spec("liger_kernel") is not None
    tried = [*(OWN if options.own else ()), *GPU]
    names = [TUNESMITH, *(name for name in tried if liger or "Liger" not in name)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            runs[name].append(run_peer(name, {**job, "device": OWN.get(name, {})}))
    facts = {
        "data": f"{case}, documents of {options.length} tokens", "lora": rank,
        "dtype": "bfloat16", "rows": count, "documents": options.documents, "lr": job["lr"],
        "rounds": options.rounds, "threads": options.threads, "processor": device(),
        "python": platform.python_version(),
    }  # fmt: skip
    write_report(options.out / f"gpu_{case}", facts, runs)


def device() -> str:
    """What the runs are on."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="JSONL questions and answers")
    parser.add_argument("--case", action="append", choices=CASES, required=True)
    parser.add_argument("--own", action="store_true", help="also try what Tunesmith can turn off")
    parser.add_argument("--documents", type=int, default=8, help="documents a step (8)")
    parser.add_argument("--length", type=int, default=4096, help="tokens a document (4096)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run (5)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (2)")
    parser.add_argument("--threads", type=int, default=8, help="CPU threads (8)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    for case in options.case:
        with tempfile.TemporaryDirectory() as folder:
            measure(case, options, Path(folder))


if __name__ == "__main__":
    main()
