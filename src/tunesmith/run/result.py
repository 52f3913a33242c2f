"""Results of a run: samples at evaluations, and the model folder and the report at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.build.job import Job, saved_optimizer
from tunesmith.checkpoint.folder import load_checkpoint
from tunesmith.config.dump import to_yaml
from tunesmith.export import DataEntry, ModelCard, TemplateChoice, write_model
from tunesmith.generate import generate, prompts_from_document
from tunesmith.metrics.records import JsonlSink, read_records
from tunesmith.report import write_report
from tunesmith.storage.run_folder import run_files
from tunesmith.train.trainer import Trainer


def sampler(job: Job, path: Path, *, after_step: int) -> Callable[[int], None] | None:
    """A callback that writes answers to the first held-out prompts to samples.jsonl.

    None if `eval.samples` is 0 or there are no held-out prompts. It is called at each evaluation.
    """
    count = job.choices.recipe.eval.samples
    if not count or not job.data.eval_sets:
        return None
    chosen = [
        (document.origin, prompt)
        for document in job.data.eval_sets[0].documents
        if (prompt := prompts_from_document(document, job.data.template)) is not None
    ][:count]
    if not chosen:
        return None
    JsonlSink(path, after_step=after_step).close()

    def on_eval(step: int) -> None:
        answers = generate(
            job.training.model, job.data.template, [prompt.ids for _, prompt in chosen],
            max_new_tokens=job.choices.recipe.eval.max_new_tokens,
        )  # fmt: skip
        sink = JsonlSink(path)
        for (origin, prompt), answer in zip(chosen, answers, strict=True):
            sink.write(
                {
                    "kind": "sample",
                    "step": step,
                    "source": origin.source,
                    "row": origin.row,
                    "prompt": prompt.text,
                    "reference": prompt.reference,
                    "answer": answer.text,
                    "stopped": answer.stopped,
                }
            )
        sink.close()

    return on_eval


def take_best(trainer: Trainer, job: Job) -> None:
    """Load the weights of the best evaluation, if `train.result` is best."""
    if job.choices.recipe.train.result != "best" or trainer.evaluations.best is None:
        return
    step = int(trainer.evaluations.best["step"])
    if step != trainer.step:
        checkpoint = run_files(trainer.folder)["checkpoints"] / f"step-{step}"
        saved_optimizer(job).load(checkpoint, load_checkpoint(checkpoint))


def write_result(path: Path, job: Job) -> dict[str, float]:
    """Write `model/` with its model card, and `report.html`; returns the run's final metrics."""
    files = run_files(path)
    records = list(read_records(files["metrics"]))
    metrics = _final_metrics(records)
    hashes = job.data.prepared.content_hashes
    counts = job.data.prepared.ledger.sources
    card = ModelCard(
        base_model=job.choices.recipe.model.name,
        base_commit=job.training.source.commit if job.training.source else None,
        data=[
            DataEntry(name, counts[name].rows_trained + counts[name].rows_truncated, digest)
            for name, digest in hashes.items()
        ],
        choice=TemplateChoice(
            template="none" if job.choices.recipe.data.template == "none" else "own",
            template_kwargs=job.choices.recipe.data.template_kwargs,
        ),
        recipe=to_yaml(job.choices.recipe),
        metrics=metrics,
    )
    write_model(
        job.training.model, job.data.template, job.training.source, files["model"], card=card,
        adapter=job.training.adapter,
    )  # fmt: skip
    write_report(
        files["report"],
        title=path.name,
        recipe=to_yaml(job.choices.recipe),
        records=records,
        ledger=job.data.prepared.ledger.to_dict(),
    )
    return metrics


def _final_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for record in records:
        if record.get("kind") == "train":
            found["loss"] = record["loss"]
        elif record.get("kind") == "eval":
            for name in ("nll", "perplexity", "accuracy"):
                found[f"{record['set']}/{name}"] = record[name]
        elif record.get("event") == "skipped":
            found["skipped_steps"] = found.get("skipped_steps", 0) + 1
        elif record.get("event") == "spike":
            found["spikes"] = found.get("spikes", 0) + 1
    return found
