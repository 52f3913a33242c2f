"""P1: every target is predicted from exactly the ids that inference has.

The oracle is the tokenizer as transformers loads it: before each answer it is asked for the ids
with `apply_chat_template(messages[:k], add_generation_prompt=True)`, and the answer's text is
encoded by itself. Nothing of the renderer is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.build.job import Job
from tunesmith.build.sources import make_sources
from tunesmith.data.formats.detect import detect_format, to_example
from tunesmith.data.formats.examples import Chat, Completion, Example, Text
from tunesmith.data.sources.sources import read_rows
from tunesmith.data.templates.template import Template
from tunesmith.types import Document, Origin
from tunesmith.verify.outcome import Outcome

SHOWN = 3
"""Mismatches that are spelled out."""


@dataclass(slots=True)
class _Tally:
    documents: int = 0
    answers: int = 0
    targets: int = 0
    passed_over: int = 0  # rows that bring their own tokens
    wrong: list[str] = field(default_factory=list[str])


def inference_faithful(job: Job, folders: Sequence[Path]) -> Outcome:
    """Hold every document of the job against what inference makes of its row."""
    oracle = Oracle(job)
    by_origin = {
        d.origin: d for d in (job.data.documents[n] for n in range(len(job.data.documents)))
    }
    tally = _Tally()
    for origin, example in examples(job, folders):
        document = by_origin.get(origin)
        if document is None:
            continue  # dropped or refused, which the ledger says
        if not isinstance(example, Chat | Completion | Text):
            tally.passed_over += 1
            continue
        tally.documents += 1
        _compare(job, oracle, document, example, tally)
    note = "; ".join(tally.wrong[:SHOWN])
    if tally.passed_over:
        note += f"{'; ' if note else ''}{tally.passed_over} rows bring their own tokens"
    return Outcome(
        promise="P1",
        name="inference-faithful",
        compared="ids before each answer, and its targets up to the stop token",
        oracle="apply_chat_template of the plain tokenizer, turn by turn",
        counts={
            "documents": tally.documents,
            "answers": tally.answers,
            "targets": tally.targets,
        },
        difference=float(len(tally.wrong)),
        tolerance=0.0,
        measure="mismatches",
        verdict="fails" if tally.wrong else "holds" if tally.documents else "not checked",
        note=note,
        advice="the rows named are learned in another context than inference has; look at them "
        "with `tunesmith preview`, and report the template" if tally.wrong else "",
    )  # fmt: skip


def examples(job: Job, folders: Sequence[Path]) -> Iterator[tuple[Origin, Example]]:
    """The rows of the job's sources, read once more."""
    data = job.choices.recipe.data
    for source in make_sources(data.train, data, folders=folders):
        for row in read_rows(source):
            if row.values is None:
                continue
            form = source.format if source.format != "auto" else None
            form = form or job.data.prepared.formats.get(source.name) or detect_format(row.values)
            try:
                templated = job.data.template.has_chat_template
                yield row.origin, to_example(row.values, format=form or "", templated=templated)
            except Exception:
                continue  # a bad row; it has no document either


class Oracle:
    """A tokenizer that knows nothing of Tunesmith."""

    def __init__(self, job: Job) -> None:
        self.template: Template = job.data.template
        self.tokenizer = _plain_tokenizer(job)

    def prompt(self, messages: Sequence[Mapping[str, Any]], chat: Chat) -> list[int]:
        """The ids that inference starts an answer from."""
        found = self._apply(messages, chat, add_generation_prompt=True, tokenize=True)
        return [int(token) for token in found]

    def answer(self, chat: Chat, number: int) -> list[int] | None:
        """The ids of message `number` after its prompt, up to its first stop token; None if the
        message does not continue its prompt.
        """
        messages = _plain(chat)
        asked = self._apply(messages[:number], chat, add_generation_prompt=True, tokenize=False)
        whole = self._apply(messages[: number + 1], chat, tokenize=False)
        if not whole.startswith(asked):
            return None
        return self.until_stop(self.encode(whole[len(asked) :], special=False))

    def whole(self, chat: Chat) -> list[int]:
        """The ids of the whole conversation."""
        return self.encode(self._apply(_plain(chat), chat, tokenize=False), special=False)

    def encode(self, text: str, *, special: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return [int(token) for token in ids]

    def until_stop(self, ids: list[int]) -> list[int]:
        places = [place for place, token in enumerate(ids) if token in self.template.stop_ids]
        return ids[: places[0] + 1] if places else ids

    def _apply(self, messages: Sequence[Mapping[str, Any]], chat: Chat, **options: Any) -> Any:
        # One conversation that is empty is only read as a batch of one.
        return self.tokenizer.apply_chat_template(
            [[dict(message) for message in messages]],
            tools=chat.tools,
            chat_template=self.template.jinja,
            return_dict=False,
            **{**self.template.kwargs, **chat.template_kwargs, **options},
        )[0]


def _plain_tokenizer(job: Job) -> Any:
    if job.training.source is None or job.data.template.added or job.data.template.named:
        return job.data.template.tokenizer  # tokens were added, which the folder's does not have
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        job.training.source.tokenizer_folder,
        trust_remote_code=job.choices.recipe.model.trust_remote_code,
    )


def _plain(chat: Chat) -> list[dict[str, Any]]:
    return [message.to_dict() for message in chat.messages]


def _compare(job: Job, oracle: Oracle, document: Document, example: Example, tally: _Tally) -> None:
    tally.targets += document.target_tokens
    if isinstance(example, Chat) and job.choices.recipe.data.train_on != "all":
        wrong = list(_chat(job, oracle, document, example, tally))
    else:
        tally.answers += 1
        wrong = _stream(job, oracle, document, example)
    tally.wrong += [f"{document.origin}: {text}" for text in wrong]


def _chat(job: Job, oracle: Oracle, document: Document, chat: Chat, tally: _Tally) -> Iterator[str]:
    found = _learned(document)
    expected = _expected(chat, job.choices.recipe.data.train_on)
    cut = job.choices.recipe.data.too_long in ("truncate", "split")
    missing = [n for n in expected if n not in found and n > 0]
    if (missing and not cut) or any(n not in expected for n in found):
        yield f"learns messages {sorted(found)}, not {expected}"
    messages = _plain(chat)
    for number, (before, targets, weights) in found.items():
        if number not in expected or chat.messages[number].role != "assistant":
            continue
        tally.answers += 1
        wanted = chat.messages[number].weight
        if before != oracle.prompt(messages[:number], chat):
            yield f"the ids before message {number} are not those of inference"
        elif targets != oracle.answer(chat, number):
            yield f"the targets of message {number} are not its ids up to the stop token"
        elif targets[-1] not in oracle.template.stop_ids:
            yield f"message {number} does not end with a stop token"
        elif any(weight != (1.0 if wanted is None else wanted) for weight in weights):
            yield f"the weights of message {number} are not {wanted or 1.0:g}"


def _expected(chat: Chat, train_on: str | list[str]) -> list[int]:
    """The messages that the recipe and the row ask to be learned."""
    roles = ["assistant"] if isinstance(train_on, str) else train_on
    wanted = [n for n, message in enumerate(chat.messages) if message.role in roles]
    if chat.first_completion is not None and train_on in ("auto", "completion"):
        wanted = [n for n in wanted if n >= chat.first_completion]
    if train_on == "last":
        wanted = wanted[-1:]
    marked = {
        n: message.train for n, message in enumerate(chat.messages) if message.train is not None
    }
    wanted = [n for n in range(len(chat.messages)) if marked.get(n, n in wanted)]
    return [n for n in wanted if chat.messages[n].weight != 0]


def _learned(document: Document) -> dict[int, tuple[list[int], list[int], list[float]]]:
    """For each message: the ids before its first target, its targets and their weights."""
    found: dict[int, tuple[list[int], list[int], list[float]]] = {}
    for segment in document.segments:
        for index, message, weight in zip(
            segment.index.tolist(), segment.message.tolist(), segment.weight.tolist(), strict=True
        ):
            if message not in found:
                before, above = segment.ids[:index].tolist(), segment.parent
                while above >= 0:
                    before = document.segments[above].ids.tolist() + before
                    above = document.segments[above].parent
                found[message] = (before, [], [])
            found[message][1].append(int(segment.ids[index]))
            found[message][2].append(weight)
    return found


def _stream(job: Job, oracle: Oracle, document: Document, example: Example) -> list[str]:
    """What is wrong with a row that is one run of tokens: raw, or a chat learned as a whole."""
    stops = oracle.template.stop_ids
    if isinstance(example, Chat):
        ids = oracle.whole(example)
        ends = [place for place, token in enumerate(ids) if token in stops]
        first = 1
        tails = {len(ids), ends[-1] + 1 if ends else len(ids)}
    else:
        ids, first = _raw(job, oracle, example)
        tails = {len(ids)}
    got = [token for segment in document.segments for token in segment.ids.tolist()]
    if job.choices.recipe.data.too_long in ("truncate", "split") and len(got) != len(ids):
        return []  # cut, which the ledger counts
    if not any(got == ids[:tail] for tail in tails):
        return ["its ids are not those of the plain tokenizer"]
    learned = sum(len(segment.index) for segment in document.segments)
    if len(document.segments) == 1 and learned != len(got) - first:
        return [f"{learned} of its tokens are targets, not {len(got) - first}"]
    return []


def _raw(job: Job, oracle: Oracle, example: Example) -> tuple[list[int], int]:
    """Ids of a text or a prompt with its completion, closed, and where the targets begin."""
    eos, stops = oracle.template.eos_id, oracle.template.stop_ids
    close = [] if eos is None else [eos]
    if isinstance(example, Text):
        ids = _once(oracle, oracle.encode(example.text, special=True))
        return (ids if ids and ids[-1] in stops else ids + close), 1
    assert isinstance(example, Completion)
    prompt = _once(oracle, oracle.encode(example.prompt, special=True))
    while len(prompt) > 1 and prompt[-1] in stops:
        prompt = prompt[:-1]
    answer = oracle.encode(example.completion, special=False)
    answer = answer if answer and answer[-1] in stops else answer + close
    first = 1 if job.choices.recipe.data.train_on == "all" else max(len(prompt), 1)
    return prompt + answer, first


def _once(oracle: Oracle, ids: list[int]) -> list[int]:
    """BOS exactly once, where the text brings one too."""
    bos = oracle.template.bos_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
