"""One run of TRL's SFTTrainer, timed from outside its steps; vs_trl.py gives it a process.

    python benchmarks/trl_run.py '{"setting": "default", "model": M, "rows": F, "documents": 8,
                                   "lr": 1e-4, "warmup": 1, "seed": 42, "threads": 2}'

The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

from peak import peak_memory

KEEP = {"gradient_checkpointing": False, "max_length": None}
FLAT = {"padding_free": True}
PACKED = {"packing": True, "packing_strategy": "bfd", "micro": 1}

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {**KEEP, "bf16": False, "dtype": "float32"},
    "bf16 weights": {**KEEP, "bf16": False, "dtype": "bfloat16"},
    "autocast": {**KEEP, "bf16": True, "dtype": "float32"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded, by length": {"train_sampling_strategy": "group_by_length"},
    "padded, 2 at a time": {"micro": 2},
    "one at a time": {"micro": 1},
    "padding-free": FLAT,
    "padding-free, 4 at a time": {**FLAT, "micro": 4},
    "padding-free, 2 at a time": {**FLAT, "micro": 2},
    "packed to 512": {**PACKED, "max_length": 512},
    "packed to 1024": {**PACKED, "max_length": 1024},
}
SETTINGS: dict[str, dict[str, Any]] = {
    # As it comes: float32 weights under bfloat16 autocast, padded, activations recomputed.
    "default": {},
    **{
        f"{precision}, {shape}": {**PRECISIONS[precision], **SHAPES[shape]}
        for precision in PRECISIONS
        for shape in SHAPES
    },
}
LIGER = {"use_liger_kernel": True}
GPU: dict[str, dict[str, Any]] = {
    "bf16 weights, 2 at a time": SETTINGS["bf16 weights, padded, 2 at a time"],
    "bf16 weights, Liger, one at a time": {**SETTINGS["bf16 weights, one at a time"], **LIGER},
    "bf16 weights, Liger, padding-free": {**SETTINGS["bf16 weights, padding-free"], **LIGER},
    "bf16 weights, Liger, packed to 4096": {
        **PRECISIONS["bf16 weights"], **PACKED, **LIGER, "max_length": 4096,
    },
}  # fmt: skip
"""Settings that `gpu_vs_trl.py` tries."""
SETTINGS |= GPU
"""Arguments of SFTConfig; `dtype` is the model's and `micro` the documents of a micro-batch."""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train once over the rows; tokens are those that are not padding, seconds the steps' own."""
    import torch
    import transformers
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    torch.set_num_threads(job["threads"])
    transformers.logging.set_verbosity_error()
    steps: list[dict[str, Any]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append({"ended": time.perf_counter(), "tokens": 0, "targets": 0, "loss": 0.0})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps[-1]["ended"] = time.perf_counter()
            steps.append({"ended": 0.0, "tokens": 0, "targets": 0, "loss": 0.0})

    class Counted(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            loss = super().training_step(model, inputs, *args)
            steps[-1]["tokens"] += tokens
            steps[-1]["targets"] += int((inputs["labels"] != -100).sum())
            steps[-1]["loss"] += float(loss)  # shares of one step's mean over its targets
            return loss

    setting = dict(SETTINGS[job["setting"]])
    micro = setting.pop("micro", job["documents"])
    dtype = setting.pop("dtype", None)
    packed = setting.get("packing", False)  # a block is then a step
    with open(job["rows"], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        as_strings(row)
    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": 1 if packed else max(1, job["documents"] // micro),
            "num_train_epochs": 1,
            "learning_rate": job["lr"],
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "seed": job["seed"],
            **setting,
        }
        if dtype is not None:
            arguments["model_init_kwargs"] = {"dtype": dtype}
        trainer = Counted(
            model=job["model"],
            args=trl.SFTConfig(**arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[Clock()],
            peft_config=_lora(job.get("lora", 0)),
        )
        collate, stop = trainer.data_collator, trainer.processing_class.eos_token_id
        trainer.data_collator = lambda features: end_at_stop(collate(features), stop)
        weights = str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
        steps.clear()
        trainer.train()
    return {**_summary(steps, job["warmup"]), "weights": weights, "version": trl.__version__}


def as_strings(row: dict[str, Any]) -> None:
    """Turn tools and calls' arguments into JSON: Arrow would give each the keys of all others."""
    if "tools" in row:
        row["tools"] = json.dumps(row["tools"])
    for message in [*row["prompt"], *row["completion"]]:
        for call in message.get("tool_calls") or ():
            arguments = call["function"]["arguments"]
            call["function"]["arguments"] = json.dumps(arguments, ensure_ascii=False)


def _lora(rank: int) -> Any:
    if not rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def end_at_stop(batch: dict[str, Any], stop: int) -> dict[str, Any]:
    """The batch without the target that follows the stop token: what the template writes there.

    TRL learns it (a newline, in ChatML) and Tunesmith does not; without it the losses are of the
    same targets.
    """
    labels = batch["labels"]
    labels[:, 1:][labels[:, :-1] == stop] = -100
    return batch


def _summary(steps: list[dict[str, Any]], warmup: int) -> dict[str, Any]:
    done = [step for step in steps if step["ended"] and step["tokens"]]
    timed = done[warmup:]
    seconds = timed[-1]["ended"] - done[warmup - 1]["ended"]
    tokens = sum(step["tokens"] for step in timed)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "losses": [step["loss"] for step in done],
        "step_tokens": [step["tokens"] for step in done],
        "step_targets": [step["targets"] for step in done],
        "peak_rss": peak_memory(),
    }


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(json.dumps(measure(json.loads(sys.argv[1]))))
