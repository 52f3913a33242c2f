"""`tunesmith eval`: loss, token accuracy and exact match of generated answers on data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.session import (
    DataOption,
    Limit,
    MaxNewTokens,
    ModelArgument,
    Overrides,
    Session,
    open_session,
    print_status,
    read_settings,
    sources_of,
)
from tunesmith.display import put
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.data.preprocess.prepare import Prepared
    from tunesmith.generate import Prompt
    from tunesmith.types import Document

MICRO_TOKENS = 4096
"""Tokens of a micro-batch if device.micro_tokens is auto."""


def evaluate(
    model: ModelArgument,
    data: DataOption,
    overrides: Overrides = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    recipe = read_settings(model, data=data, overrides=overrides or (), limit=limit)
    session = open_session(recipe)
    rows = read_documents(session)
    assert rows is not None
    answered = rows if _targets_are_answers(session) else read_documents(session, last=True)
    prompts = [] if answered is None else find_prompts(session, answered)
    result = measure(session, rows.documents, prompts, max_new_tokens=max_new_tokens)
    if as_json:
        put(json.dumps({"model": model, "data": list(data), **result}, ensure_ascii=False))
        return
    _print_table(result)


def _targets_are_answers(session: Session) -> bool:
    """True if targets are whole answers: then the ids before the last of them are a prompt."""
    return session.recipe.data.train_on in ("auto", "assistant", "last", "completion")


def read_documents(session: Session, *, last: bool = False) -> Prepared | None:
    """The rows, rendered as in training.

    With `last`, only the last answer of each row is a target, rows without one are left out, and
    the result is None if no row has one.
    """
    from tunesmith.build.data import resolve_max_length
    from tunesmith.data.preprocess.prepare import prepare

    section = session.recipe.data
    try:
        return prepare(
            sources_of(session.recipe),
            session.template,
            train_on="last" if last else section.train_on,
            max_length=resolve_max_length(session.recipe, session.template),
            too_long=section.too_long,
            bad_rows="drop" if last else section.bad_rows,
            faults_file=None,
        )
    except DataError:
        if last:  # not one row has an answer
            return None
        raise


def find_prompts(session: Session, rows: Prepared) -> list[Prompt]:
    """The prompts of the rows that have a whole answer."""
    from tunesmith.generate import prompts_from_document

    found = [
        prompts_from_document(
            document,
            session.template,
            completion=rows.formats[document.origin.source] != "text",
        )
        for document in rows.documents
    ]
    return [prompt for prompt in found if prompt is not None]


def measure(
    session: Session,
    documents: Sequence[Document],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
) -> dict[str, Any]:
    """The means over all targets of `documents`, and exact match over the answers to `prompts`."""
    from tunesmith.generate import generate
    from tunesmith.model.selftest import self_test
    from tunesmith.train.evaluate import evaluate as evaluate_loss

    longest = max(document.longest_path for document in documents)
    for note in self_test(session.model, max_length=longest).notes:
        print_status(note)
    micro_tokens = session.recipe.device.micro_tokens
    loss = evaluate_loss(
        session.model,
        documents,
        micro_tokens=MICRO_TOKENS if micro_tokens == "auto" else micro_tokens,
        device=session.device,
    )
    result: dict[str, Any] = {
        "rows": loss.documents,
        "target_tokens": loss.target_tokens,
        "nll": loss.nll,
        "perplexity": loss.perplexity,
        "token_accuracy": loss.accuracy,
    }
    if prompts:
        print_status(f"generating answers to {len(prompts)} prompts")
        answers = generate(
            session.model,
            session.template,
            [prompt.ids for prompt in prompts],
            max_new_tokens=max_new_tokens,
        )
        same = [
            answer.text.strip() == (prompt.reference or "").strip()
            for answer, prompt in zip(answers, prompts, strict=True)
        ]
        result["answered"] = len(prompts)
        result["exact_match"] = sum(same) / len(prompts)
        result["ended"] = sum(answer.stopped for answer in answers) / len(prompts)
    return result


LABELS = {
    "rows": ("rows", "{:,}"),
    "target_tokens": ("target tokens", "{:,}"),
    "nll": ("NLL per target token (nats)", "{:.4f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "token_accuracy": ("token accuracy", "{:.2%}"),
    "answered": ("answers generated", "{:,}"),
    "exact_match": ("exact match", "{:.2%}"),
    "ended": ("ended with a stop token", "{:.2%}"),
}


def _print_table(result: dict[str, Any]) -> None:
    width = max(len(LABELS[name][0]) for name in result)
    for name, value in result.items():
        label, form = LABELS[name]
        put(f"{label:<{width}}  {form.format(value):>12}")
