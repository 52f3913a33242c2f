"""P6: the result is the whole checkpoint, and an adapter fits the class that the base's config.json
names.

What is in the files is read with safetensors alone, and models with plain transformers and peft.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tunesmith.build.job import Job
from tunesmith.model.weight_files import WeightFiles, tensors_by_file_name
from tunesmith.types import Document
from tunesmith.verify.exported import ADVICE, Exported, reload_plain, tolerance, unreadable
from tunesmith.verify.outcome import Outcome, judged

SHOWN = 3


def checkpoint_lines(subject: Exported, documents: Sequence[Document]) -> list[Outcome]:
    """The line for a whole model, or the one for an adapter; none of a model given in memory."""
    job = subject.job
    if job.training.source is None or unreadable(job) is not None:
        return []
    if hasattr(job.training.model.model, "peft_config"):
        return [adapter_fits(subject, documents)]
    return [whole_checkpoint(subject)]


def whole_checkpoint(subject: Exported) -> Outcome:
    """Every tensor of the base's files is in the result's, unchanged where it was not trained."""
    job = subject.job
    assert job.training.source is not None
    base, result = WeightFiles(job.training.source.folder), WeightFiles(subject.folder)
    trained = _trained(job, base.names)
    wrong: list[str] = []
    same = 0
    for name in sorted(base.names):
        if name not in result.names:
            wrong.append(f"{name} is missing")
        elif _equal(base.tensor(name), result.tensor(name)):
            same += 1
        elif name not in trained:
            wrong.append(f"{name} was not trained and is changed")
    return Outcome(
        promise="P6",
        name="whole checkpoint",
        compared=f"{subject.what}: every tensor of the base is in it, unchanged where not trained",
        oracle="safetensors, reading both folders",
        counts={"tensors": len(base.names), "unchanged": same},
        difference=float(len(wrong)),
        tolerance=0.0,
        measure="missing or changed",
        verdict="fails" if wrong else "holds",
        note=", ".join(wrong[:SHOWN]),
        advice=ADVICE if wrong else "",
    )


def adapter_fits(subject: Exported, documents: Sequence[Document]) -> Outcome:
    """The adapter's file has the keys that peft puts on the class of config.json, and there it
    moves the logits as in training.
    """
    job = subject.job
    line: dict[str, Any] = dict(
        promise="P6", name="adapter on its class",
        compared=f"{subject.what}: keys of its file, and by how much it moves the logits",
        oracle="peft, on the transformers class that the base's config.json names",
        measure="relative, logits moved",
    )  # fmt: skip
    keys = _adapter_keys(subject.folder)
    try:
        reloaded = reload_plain(job, subject.folder)
    except Exception as error:  # whatever a reader raises means that the folder can't be read
        return Outcome(
            **line, counts={"keys": len(keys)}, verdict="fails", advice=ADVICE,
            note=f"can't be loaded: {type(error).__name__}", difference=float("inf"), tolerance=0.0,
        )  # fmt: skip
    wrong = _other_keys(reloaded, keys)
    moved, apart = _moved(job, reloaded, documents)
    if job.choices.recipe.model.quantization != "none":
        apart = 0.0  # the plain base is another one: "export = trained" judges on the quantised
    if not wrong and moved == 0 and _has_learned(job):
        wrong = ["it does not move the logits"]
    allowed = tolerance(job)
    return Outcome(
        **line,
        counts={"keys": len(keys), "documents": len(documents)},
        difference=apart,
        tolerance=allowed,
        verdict="fails" if wrong else judged(apart, allowed),
        note=", ".join(wrong[:SHOWN]),
        advice=ADVICE if wrong or not apart <= allowed else "",
    )


def _equal(one: Tensor, two: Tensor) -> bool:
    """To the bit, so that what is not a number is the same too."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, two)]
    return not one.numel() or torch.equal(*bits)


def _trained(job: Job, base: Collection[str]) -> set[str]:
    """Names in the base's files of what is made from trained parameters."""
    model = job.training.model.base
    named = dict(model.named_parameters(remove_duplicate=False))
    held = {name: p.detach() for name, p in named.items() if p.requires_grad}
    return set(tensors_by_file_name(model, held, base).known)


def _adapter_keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("adapter_model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


def _other_keys(reloaded: Any, keys: set[str]) -> list[str]:
    """Keys that the file and the adapter on the model do not share."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(reloaded, save_embedding_layers=False))
    lacking = [f"{key} is missing" for key in sorted(expected - keys)]
    return lacking + [f"{key} belongs nowhere" for key in sorted(keys - expected)]


def _has_learned(job: Job) -> bool:
    """Whether the adapter is not where it began, with B at zero. One that began as a part of the
    base may stand anywhere.
    """
    if job.training.adapter.start is not None or job.training.adapter.of_quantized:
        return False
    named = job.training.model.model.named_parameters()
    ups = [p for name, p in named if p.requires_grad and "lora_B" in name]
    return any(bool(p.any()) for p in ups)


def _moved(job: Job, reloaded: Any, documents: Sequence[Document]) -> tuple[float, float]:
    """How far the adapter moves the logits of the plain base, and the largest difference of where
    it moves them to from the job's logits, both relative to the base's.
    """
    moved = apart = 0.0
    with torch.no_grad(), job.training.model.generation() as model:
        for document in documents:
            ids = torch.tensor(document.segments[0].ids.tolist(), device=job.training.device)[None]
            ours, theirs = (one(input_ids=ids, use_cache=False).logits for one in (model, reloaded))
            with reloaded.disable_adapter():
                plain = reloaded(input_ids=ids, use_cache=False).logits.float()
            size = float(plain.norm())
            moved = max(moved, float((theirs.float() - plain).norm()) / size)
            difference = float((theirs.float() - ours.float()).norm()) / size
            apart = difference if not difference <= apart else apart
    return moved, apart
