"""Statistics of the data: rows, turns, lengths, targets, steps, shared prefixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tunesmith.data.formats.examples import (
    Chat,
    Completion,
    Parts,
    TemplatedText,
    Text,
    Tokens,
)
from tunesmith.data.microbatch.prefix_tree import build_forest, measure
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.doctor.corpus import ASSISTANT, Case, Corpus, Setup
from tunesmith.types import Document

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_PROBED = 3  # steps whose prefixes are merged


def summarize(
    corpus: Corpus, setup: Setup, sampler: BatchSampler | None, ordered: Sequence[Document]
) -> dict[str, Any]:
    """Plain values for JSON and for the page; lengths in tokens of the longest path. `order`
    numbers the documents of `ordered`.
    """
    documents = [
        case.rendered.document
        for case in corpus.train
        if case.rendered is not None and case.rendered.document is not None
    ]
    tokens = sum(document.tokens for document in documents)
    targets = [document.target_tokens for document in documents]
    return {
        "rows": len(corpus.train),
        "trained_rows": len(documents),
        "sources": dict(Counter(case.origin.source for case in corpus.train)),
        "held_out": {name: len(cases) for name, cases in corpus.held_out.items()},
        "shapes": dict(Counter(_shape(case) for case in corpus.train)),
        "roles": dict(Counter(m.role for case in corpus.train for m in case.messages)),
        "turns": _turns(corpus.train),
        "rows_with_tools": sum(
            isinstance(case.example, Chat) and bool(case.example.tools) for case in corpus.train
        ),
        "template": setup.template.name,
        "max_length": setup.max_length,
        "length": _percentiles(case.length for case in corpus.train if case.length),
        "targets": _percentiles(targets),
        "tokens": tokens,
        "target_tokens": sum(targets),
        "steps_per_epoch": sampler.steps_per_epoch if sampler is not None else 0,
        "total_steps": setup.total_steps or 0,
        "shared_prefix_share": _shared(ordered, sampler),
    }


def _shape(case: Case) -> str:
    names = {
        Chat: "chat",
        Completion: "prompt and completion, raw",
        Text: "text",
        Parts: "segments",
        TemplatedText: "text of a template",
        Tokens: "tokens",
    }
    return "unreadable" if case.example is None else names[type(case.example)]


def _turns(cases: Iterable[Case]) -> dict[str, float]:
    """Answers a chat: the fewest, the mean, the most."""
    counts = [sum(m.role == ASSISTANT for m in case.messages) for case in cases if case.messages]
    if not counts:
        return {}
    return {"least": min(counts), "mean": sum(counts) / len(counts), "most": max(counts)}


def _percentiles(values: Iterable[int]) -> dict[str, int]:
    found = np.fromiter(values, np.int64)
    if not len(found):
        return {}
    levels = np.percentile(found, PERCENTILES, method="nearest")
    return {f"p{at}": int(level) for at, level in zip(PERCENTILES, levels, strict=True)}


def _shared(documents: Sequence[Document], sampler: BatchSampler | None) -> float:
    """Share of tokens that needn't be computed because a step's documents begin alike.

    Measured on the first steps.
    """
    if sampler is None:
        return 0.0
    whole = needed = 0
    for step in range(min(_PROBED, sampler.steps_per_epoch)):
        chosen = [documents[int(number)] for number in sampler.step_indices(step)]
        whole += sum(measure(root) for root in build_forest(chosen, share_prefixes=False))
        needed += sum(measure(root) for root in build_forest(chosen, share_prefixes=True))
    return 1 - needed / whole if whole else 0.0
