"""Seconds from the command to the end of the first step, Tunesmith and TRL in turn.

    python benchmarks/startup.py --model MODEL --data gsm8k/train.jsonl

Both read all rows and take one step of two documents, float32, in fresh processes. Tunesmith is
run without its cache of prepared rows, and with it. Also the self-test's own seconds. Writes
results/startup.json and .md.
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

HERE = Path(__file__).resolve().parent
DONE = "step 1/"
NAMES = ("tunesmith, no cache", "tunesmith, from its cache", "TRL")


def tunesmith_command(job: dict[str, Any], *, cache: bool, out: Path) -> list[str]:
    """One step of two documents."""
    return [
        *[sys.executable, "-m", "tunesmith", "train", "--model", job["model"]],
        *["--data", job["data"], "--out", str(out), "train.steps=1", "batch.documents=2"],
        *["data.columns={prompt: question, completion: answer}", "model.dtype=float32"],
        *[f"device.cache={str(cache).lower()}", f"device.threads={job['threads']}"],
    ]


def until_first_step(command: list[str]) -> float:
    """Seconds until the command says that its first step is done; it is then stopped."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if DONE in line:
            break
    else:
        raise SystemExit(f"error: {command[:4]}\n{''.join(said)[-3000:]}")
    seconds = time.perf_counter() - begin
    process.kill()
    process.wait()
    return seconds


def trl(job: dict[str, Any]) -> None:
    """The peer's process: the same rows, one step of two documents."""
    import torch
    import trl as library
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback

    torch.set_num_threads(job["threads"])

    class Say(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            print(DONE, file=sys.stderr, flush=True)

    def chat(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }

    with tempfile.TemporaryDirectory() as folder:
        rows = load_dataset("json", data_files=job["data"], split="train", cache_dir=folder)
        trainer = library.SFTTrainer(
            model=job["model"],
            args=library.SFTConfig(
                output_dir=folder, max_steps=1, per_device_train_batch_size=2, report_to="none",
                use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
                model_init_kwargs={"dtype": "float32"}, save_strategy="no",
            ),
            train_dataset=rows.map(chat, remove_columns=rows.column_names),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[Say()],
        )  # fmt: skip
        trainer.train()


def self_test_seconds(job: dict[str, Any]) -> float:
    """The start-up self-test alone, on the loaded model."""
    code = (
        "import time, torch; from tunesmith.model.load import load_causal_lm, resolve_model\n"
        "from tunesmith.model.selftest import self_test\n"
        f"torch.set_num_threads({job['threads']})\n"
        f"model = load_causal_lm(resolve_model({job['model']!r}), dtype=torch.float32,"
        " device=torch.device('cpu')).model\n"
        "begin = time.perf_counter(); self_test(model, max_length=1024)\n"
        "print(time.perf_counter() - begin)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.split()[-1])


def measure(job: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, `rounds` times in turn; a run that fills the cache comes first, untimed."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TUNESMITH_CACHE"] = str(Path(folder) / "cache")
        out = Path(folder)
        until_first_step(tunesmith_command(job, cache=True, out=out / "first"))
        for number in range(rounds):
            for cache, name in ((False, NAMES[0]), (True, NAMES[1])):
                command = tunesmith_command(job, cache=cache, out=out / f"{number}{cache}")
                found[name].append(until_first_step(command))
            peer = [sys.executable, __file__, "--peer", json.dumps(job)]
            found[NAMES[2]].append(until_first_step(peer))
            print({name: round(took[-1], 1) for name, took in found.items()}, file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model")
    parser.add_argument("--data", help="JSONL rows with question and answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    arguments = parser.parse_args()
    if arguments.peer:
        trl(json.loads(arguments.peer))
        return
    job = {"model": arguments.model, "data": arguments.data, "threads": arguments.threads}
    found = measure(job, arguments.rounds)
    tested = self_test_seconds(job)
    lines = [
        f"{Path(arguments.data).name}, {arguments.threads} threads, {arguments.rounds} rounds.",
        "",
        "| run | seconds to the end of the first step, min-median-max |",
        "|---|---|",
        *[
            f"| {name} | {min(s):.1f} - {statistics.median(s):.1f} - {max(s):.1f} |"
            for name, s in found.items()
        ],
        "",
        f"The self-test takes {tested:.1f} s of them.",
    ]
    path = arguments.out / "startup.json"
    path.write_text(json.dumps({"seconds": found, "self_test": tested}, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
