"""P6: the exported folder, read by plain transformers or peft, is the trained model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.build.job import Job
from tunesmith.config.dump import to_yaml
from tunesmith.data.formats.examples import Chat, Example
from tunesmith.export import ModelCard, TemplateChoice, write_model
from tunesmith.types import Document
from tunesmith.verify.outcome import Outcome, judged

ADVICE = "don't use the folder: other programs would run another model than the one trained"
PROBES = ("Ünïcode 价格 and 42", "  two spaces\n\n\tand a tab", "a <b> \\n 'quoted' {{ braces }}")


@dataclass(frozen=True, slots=True)
class Exported:
    """A trained job and the folder that was written of it."""

    job: Job
    folder: Path
    what: str  # in words


def write(job: Job, folder: Path) -> None:
    """Write the job's model as a run would."""
    raw = job.choices.recipe.data.template == "none"
    choice = TemplateChoice(
        template="none" if raw else "own", template_kwargs=job.choices.recipe.data.template_kwargs
    )
    card = ModelCard(
        base_model=job.choices.recipe.model.name, choice=choice, recipe=to_yaml(job.choices.recipe)
    )  # fmt: skip
    write_model(
        job.training.model, job.data.template, job.training.source, folder, card=card,
        adapter=job.training.adapter,
    )  # fmt: skip


def export_checks(
    subject: Exported, documents: Sequence[Document], examples: Sequence[Example]
) -> list[Outcome]:
    """The two lines of P6 on what the folder computes and which ids it has."""
    return [same_logits(subject, documents), same_ids(subject, documents, examples)]


def same_logits(subject: Exported, documents: Sequence[Document]) -> Outcome:
    """Trained parameters to the bit, logits within rounding."""
    job = subject.job
    counts = {"documents": len(documents), "parameters": 0}
    line: dict[str, Any] = dict(
        promise="P6", name="export = trained",
        compared=f"{subject.what}: trained weights to the bit, logits of every token",
        oracle="plain transformers and peft, reading the folder",
        measure="relative, logits",
    )  # fmt: skip
    reason = unreadable(job)
    if reason is not None:
        return Outcome(**line, counts={}, verdict="not checked", note=reason)
    try:
        reloaded = reload_plain(job, subject.folder)
    except Exception as error:  # whatever a reader raises means that the folder can't be read
        first = (str(error).splitlines() or [""])[0]
        return Outcome(
            **line, counts=counts, difference=float("inf"), tolerance=0.0, verdict="fails",
            note=f"can't be loaded: {type(error).__name__}: {first[:200]}", advice=ADVICE,
        )  # fmt: skip
    unequal, counts["parameters"] = _unequal_weights(job, reloaded)
    difference, counts["tokens"] = _logits_apart(job, reloaded, documents)
    note = f"other weights: {', '.join(unequal[:3])}" if unequal else ""
    kind = job.choices.recipe.model.quantization
    if kind != "none":
        note += f"{'; ' if note else ''}its base as trained on, in {kind}; on the plain base that "
        note += f"the folder names logits are {difference:.1e} apart"
        counts["quantised maps"] = _take_base(reloaded, job)
        difference, _ = _logits_apart(job, reloaded, documents)
    allowed = tolerance(job)
    verdict = "fails" if unequal else judged(difference, allowed)
    return Outcome(
        **line,
        counts=counts,
        difference=difference,
        tolerance=allowed,
        verdict=verdict,
        note=note,
        advice=ADVICE if verdict == "fails" else "",
    )


def same_ids(
    subject: Exported, documents: Sequence[Document], examples: Sequence[Example]
) -> Outcome:
    """Tokenizer, chat template and stop tokens of the folder give the ids that were trained."""
    from transformers import AutoTokenizer

    job = subject.job
    trust = job.choices.recipe.model.trust_remote_code
    theirs = AutoTokenizer.from_pretrained(subject.folder, trust_remote_code=trust)
    ours = job.data.template.tokenizer
    texts = [*PROBES, *(job.data.template.decode(d.segments[0].ids.tolist()) for d in documents)]
    wrong = [
        f"text {text[:30]!r}"
        for text in texts
        if ours(text)["input_ids"] != theirs(text)["input_ids"]
    ]
    chats = [example for example in examples if isinstance(example, Chat)][: len(documents)]
    for number, chat in enumerate(chats):
        messages = [message.to_dict() for message in chat.messages]
        options = {**job.data.template.kwargs, **chat.template_kwargs}
        rendered = [
            tokenizer.apply_chat_template(
                [messages], tools=chat.tools, tokenize=True, return_dict=False,
                **jinja, **options,
            )[0]
            for tokenizer, jinja in (
                (ours, {"chat_template": job.data.template.jinja}), (theirs, {})
            )
        ]  # fmt: skip
        if list(rendered[0]) != list(rendered[1]):
            wrong.append(f"chat {number}")
    missing = sorted(job.data.template.stop_ids - _stop_ids(subject.folder, job))
    wrong += [f"stop token {job.data.template.token_text(token)!r} is missing" for token in missing]
    return Outcome(
        promise="P6",
        name="ids and stop tokens",
        compared=f"{subject.what}: ids of texts and chats, stop tokens",
        oracle="plain AutoTokenizer and generation_config.json of the folder",
        counts={
            "texts": len(texts),
            "chats": len(chats),
            "stop tokens": len(job.data.template.stop_ids),
        },
        difference=float(len(wrong)),
        tolerance=0.0,
        measure="mismatches",
        verdict="fails" if wrong else "holds",
        note="; ".join(wrong[:3]),
        advice=ADVICE if wrong else "",
    )


def unreadable(job: Job) -> str | None:
    """Why plain readers have nothing to read, if they don't."""
    if job.training.source is None:
        return None
    adapter = hasattr(job.training.model.model, "peft_config")
    if adapter and not (job.training.source.folder / "config.json").is_file():
        return "the adapter's base is no folder that transformers reads"
    return None


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def reload_plain(job: Job, folder: Path) -> Any:
    """The folder's model or adapter, read by transformers and peft alone."""
    options: dict[str, Any] = {
        "dtype": _dtype(job),
        "trust_remote_code": job.choices.recipe.model.trust_remote_code,
    }
    with _no_progress_bar():
        if not hasattr(job.training.model.model, "peft_config"):
            model: Any = _plain_class(folder).from_pretrained(folder, **options)
            return model.to(job.training.device).eval()
        from peft import PeftModel

        assert job.training.source is not None
        source = job.training.source.folder
        base = _plain_class(source).from_pretrained(source, **options)
    if job.data.template.added:
        base.resize_token_embeddings(job.training.model.head.weight.shape[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing keys, which are counted
        adapted = PeftModel.from_pretrained(base, str(folder))
    return adapted.to(job.training.device).eval()


def _plain_class(folder: Path) -> Any:
    """The class that the folder's config.json names; where transformers has none, an auto class."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = [] if config.get("auto_map") else config.get("architectures") or []
    found = [getattr(transformers, name, None) for name in names]
    return next(filter(None, found), transformers.AutoModelForCausalLM)


def _dtype(job: Job) -> torch.dtype:
    return getattr(torch, job.choices.recipe.model.dtype)


def _unequal_weights(job: Job, reloaded: Any) -> tuple[list[str], int]:
    """Trained parameters that are not the same bits there, and how many values were compared."""
    theirs = dict(reloaded.named_parameters())
    unequal: list[str] = []
    compared = 0
    for name, parameter in job.training.model.model.named_parameters():
        if not parameter.requires_grad:
            continue
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            continue  # another form of the same addition, or a tied name: the logits judge
        compared += parameter.numel()
        if not torch.equal(other.detach().float().to(parameter.device), parameter.detach().float()):
            unequal.append(name)
    return unequal, compared


def _logits_apart(job: Job, reloaded: Any, documents: Sequence[Document]) -> tuple[float, int]:
    """The largest relative difference over the documents' first segments, and their tokens."""
    worst, tokens = 0.0, 0
    with torch.no_grad(), job.training.model.generation() as model:
        for document in documents:
            ids = torch.tensor(document.segments[0].ids.tolist(), device=job.training.device)[None]
            found: list[Tensor] = [
                one(input_ids=ids, use_cache=False).logits.float() for one in (model, reloaded)
            ]
            apart = float((found[0] - found[1]).norm() / found[0].norm())
            worst = apart if not apart <= worst else worst
            tokens += ids.shape[1]
    return worst, tokens


def _take_base(reloaded: Any, job: Job) -> int:
    """Give the plain base the weights that the job's quantised maps stand for; returns how many."""
    theirs = dict(reloaded.named_modules())
    maps = job.training.model.model.named_modules()
    found = [(name, module) for name, module in maps if hasattr(module, "plain_weight")]
    with torch.no_grad():
        for name, module in found:
            weight: Tensor = theirs[name].weight
            weight.copy_(module.plain_weight(weight.dtype))
    return len(found)


def tolerance(job: Job) -> float:
    if _dtype(job) == torch.float32:
        return 1e-5 if job.training.device.type == "cpu" else 5e-3
    return 2e-2


def _stop_ids(folder: Path, job: Job) -> set[int]:
    """What generation would stop at, as the folder says."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return set()
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return set(found) if isinstance(found, list) else set() if found is None else {found}
