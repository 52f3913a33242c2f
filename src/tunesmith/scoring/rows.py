"""Scores of each row: loss, perplexity, IFD, entropy, as training would see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.preprocess.prepare import UNUSED, Prepared
from tunesmith.data.templates.template import Template
from tunesmith.scoring.ifd import AnswerOnly, answer_headers, answers_without_prompt
from tunesmith.scoring.measure import Targets, measure_targets
from tunesmith.types import NO_MESSAGE, Document

if TYPE_CHECKING:
    import torch

    from tunesmith.model.causal_lm import CausalLM

QUANTILES = {"inverse_p_p50": 0.5, "inverse_p_p90": 0.9, "inverse_p_p99": 0.99}
_LARGEST = 700.0  # exp of more is no float64
_TOGETHER = 512  # rows that are measured before the next are looked at

Progress = Callable[[int], None]
"""Called with the number of rows that have just been scored."""


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row of a score file. All but the first five fields are None where a row has no targets.

    `inverse_p_*` are statistics of 1/p(target), each target once: the weight that supervised
    fine-tuning implicitly gives a target if it is read as a policy gradient (arXiv 2508.05629).
    """

    source: str
    row: int  # from 0
    status: str  # trained | truncated | dropped, as training would take it
    reason: str | None  # why it isn't trained on in full
    target_tokens: int
    tokens: int | None = None  # of all segments, the prompt too
    loss: float | None = None  # nats, mean per weight over the targets
    perplexity: float | None = None  # exp(loss)
    accuracy: float | None = None  # share of targets that are the likeliest token, per weight
    entropy: float | None = None  # nats, mean per weight
    loss_alone: float | None = None  # loss of the answers without their prompts
    ifd: float | None = None  # loss over loss_alone, both of the targets that the latter has
    inverse_p_mean: float | None = None
    inverse_p_p50: float | None = None
    inverse_p_p90: float | None = None
    inverse_p_p99: float | None = None
    inverse_p_max: float | None = None


def score_rows(
    prepared: Prepared,
    model: CausalLM,
    template: Template,
    *,
    micro_tokens: int,
    device: torch.device | str = "cpu",
    everything: bool = False,
    on_scored: Progress | None = None,
) -> list[RowScore]:
    """The scores of all rows of the input, in its order, dropped ones too. The model is to be in
    eval mode.

    `everything`: whole texts are learned (`train_on: all`), so no row has a prompt.
    """
    headers = answer_headers(template)
    outcomes = _outcomes(prepared)
    scored: dict[tuple[str, int], RowScore] = {}
    documents = prepared.documents
    options: dict[str, Any] = {"micro_tokens": micro_tokens, "device": device}
    for start in range(0, len(documents), _TOGETHER):
        group = [documents[at] for at in range(start, min(start + _TOGETHER, len(documents)))]
        alone = [
            None
            if everything or prepared.formats.get(document.origin.source) == "text"
            else answers_without_prompt(
                document, _headers(document, headers), bos_id=template.bos_id
            )
            for document in group
        ]
        roots = [found.document for found in alone if found is not None]
        apart = measure_targets(model, roots, **options)
        together = measure_targets(model, group, **options)
        for document, without, targets in zip(group, alone, together, strict=True):
            key = (document.origin.source, document.origin.row)
            loss, ifd = (None, None) if without is None else _ifd(targets, without, next(apart))
            found = _score(document, outcomes.get(key), targets)
            scored[key] = replace(found, loss_alone=loss, ifd=ifd)
            if on_scored is not None:
                on_scored(1)
    return [
        scored.get(key) or RowScore(*key, "dropped", reason, 0) for key, reason in outcomes.items()
    ]


def _headers(document: Document, headers: list[list[int]]) -> list[list[int]]:
    raw = any(NO_MESSAGE in segment.message for segment in document.segments)
    return [[]] if raw else headers


def _ifd(targets: Targets, without: AnswerOnly, alone: Targets) -> tuple[float, float | None]:
    """(loss of the answers alone, IFD)."""
    same = targets.without(without.unpredicted)
    loss_alone = alone.mean(alone.nll)
    return loss_alone, same.mean(same.nll) / loss_alone if loss_alone > 0 else None


def _outcomes(prepared: Prepared) -> dict[tuple[str, int], str | None]:
    """Why each row isn't trained on in full, by source and row, of all rows in input order."""
    ledger = prepared.ledger
    outcomes: dict[tuple[str, int], str | None] = {}
    for source, counts in ledger.sources.items():
        reasons: dict[int, str] = {}
        for reason, entry in ledger.reasons.get(source, {}).items():
            if reason != UNUSED:
                reasons.update(dict.fromkeys(entry.rows, reason))
        outcomes.update({(source, row): reasons.get(row) for row in range(counts.rows)})
    return outcomes


def _score(document: Document, reason: str | None, targets: Targets) -> RowScore:
    loss = targets.mean(targets.nll)
    inverse = np.exp(np.minimum(targets.nll, _LARGEST))
    return RowScore(
        document.origin.source,
        document.origin.row,
        "truncated" if reason else "trained",
        reason,
        document.target_tokens,
        tokens=document.tokens,
        loss=loss,
        perplexity=math.exp(min(loss, _LARGEST)),
        accuracy=targets.mean(targets.correct),
        entropy=targets.mean(targets.entropy),
        inverse_p_mean=float(inverse.mean()),
        inverse_p_max=float(inverse.max()),
        **{name: float(np.quantile(inverse, share)) for name, share in QUANTILES.items()},
    )


def summary(scores: Sequence[RowScore]) -> dict[str, Any]:
    """Counts, and means and medians over the rows that have scores."""
    having = [score for score in scores if score.loss is not None]
    found: dict[str, Any] = {
        "rows": len(scores),
        "scored": len(having),
        "target_tokens": sum(score.target_tokens for score in scores),
        "without_ifd": sum(score.ifd is None for score in having),
    }
    for name in ("loss", "accuracy", "entropy", "loss_alone", "ifd", "inverse_p_p50"):
        values = [value for s in having if (value := getattr(s, name)) is not None]
        found[f"median_{name}"] = float(np.median(values)) if values else None
    return found
