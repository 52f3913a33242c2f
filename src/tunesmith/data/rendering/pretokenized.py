"""Pre-tokenized rows: token ids with a loss mask, and text segments with their own control tokens.

No token is added to them, so inference must send exactly the tokens that stand before a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tunesmith.data.formats.examples import Parts, Tokens
from tunesmith.data.rendering.result import (
    NO_TARGETS,
    TOO_LONG,
    Limit,
    Rendered,
    Rendering,
    over_long,
)
from tunesmith.data.rendering.token_paths import fit_stream, make_segment
from tunesmith.data.row_errors import refuse
from tunesmith.data.templates.template import Template
from tunesmith.types import NO_MESSAGE, Document, IntArray, Origin, Segment

_Run = tuple[int, int]
"""Ids [start, end) that are targets without a gap."""


def render_parts(
    example: Parts, template: Template, train_on: str | list[str], limit: Limit, origin: Origin
) -> Rendering:
    """Render text segments, concatenated, to a document.

    Neighbouring segments with the same `train` are one text to the tokenizer. Each learned run is
    tokenized apart from what is before it, as at inference. The last learned run must end with a
    stop token.
    """
    texts = _merged(example)
    found = yield [(text, False) for text, _ in texts]
    ids = np.concatenate(found)
    runs: list[_Run] = []
    start = 0
    for part, (_, learned) in zip(found, texts, strict=True):
        if learned:
            runs.append((start, start + len(part)))
        start += len(part)
    _check_stop(ids, runs, template, "segment")
    if train_on == "all":
        return fit_stream(ids, 1, limit, origin)
    return _document(ids, _wanted(runs, train_on), limit, origin)


def prompt_of_row_text(
    example: Parts | Tokens, template: Template
) -> tuple[list[int], list[int] | None]:
    """The ids before the last learned run, and those of the run; all ids and None if nothing is
    learned.
    """
    if isinstance(example, Tokens):
        ids = list(example.ids)
        runs = _runs(example.learned)
        return (ids[: runs[-1][0]], ids[slice(*runs[-1])]) if runs else (ids, None)
    texts = _merged(example)
    last = max((at for at, (_, learned) in enumerate(texts) if learned), default=None)
    found = template.encode([text for text, _ in texts[: None if last is None else last + 1]])
    answer = None if last is None else found.pop()
    return [token for ids in found for token in ids], answer


def _merged(example: Parts) -> list[tuple[str, bool]]:
    """The texts, neighbours with the same `train` joined, and empty ones left out."""
    texts: list[tuple[str, bool]] = []
    for text, learned in example.parts:
        if texts and texts[-1][1] is learned:
            texts[-1] = (texts[-1][0] + text, learned)
        elif text:
            texts.append((text, learned))
    return texts


def render_tokens(
    example: Tokens, template: Template, train_on: str | list[str], limit: Limit, origin: Origin
) -> Rendered:
    """Render a row of token ids to a document.

    If some ids are targets and some are not, the last learned run must end with a stop token.
    """
    size = len(template.tokenizer)
    odd = next((token for token in example.ids if not 0 <= token < size), None)
    if odd is not None:
        refuse(
            "unknown-token",
            f"`input_ids` holds {odd}, but the tokenizer has ids 0 to {size - 1}",
            "the ids are those of another tokenizer",
        )
    ids, runs = np.array(example.ids, np.int32), _runs(example.learned)
    refuse_roles(train_on)
    if train_on == "all" and not all((example.weights or ())[1:]):
        refuse(
            "conflicting-wishes",
            "data.train_on=all learns every token, but `weights` leaves some out",
            "data.train_on=auto learns what the row marks",
        )
    if train_on == "all" or all(example.learned):
        rendered = fit_stream(ids, 1, limit, origin)
    else:
        _check_stop(ids, runs, template, "run of `input_ids`")
        rendered = _document(ids, _wanted(runs, train_on), limit, origin)
    return rendered if example.weights is None else _weighted(rendered, example.weights)


def _weighted(rendered: Rendered, weights: Sequence[float]) -> Rendered:
    """Set the target weights of a rendered row; pieces of a row that was split are in order."""
    if rendered.document is None:
        return rendered
    given, start = np.asarray(weights, np.float32), 0
    segments: list[Segment] = []
    for segment in rendered.document.segments:
        segments.append(replace(segment, weight=given[start + segment.index]))
        start += len(segment.ids)
    return replace(rendered, document=replace(rendered.document, segments=tuple(segments)))


def _runs(learned: Sequence[bool]) -> list[_Run]:
    marks = np.array((False, *learned, False))
    edges = np.flatnonzero(marks[1:] != marks[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def refuse_roles(train_on: str | list[str]) -> None:
    """Raises RowError if `train_on` names roles, which these rows do not have."""
    if isinstance(train_on, list):
        refuse(
            "conflicting-wishes",
            f"data.train_on names roles ({', '.join(train_on)}), but the row has none",
            "data.train_on=auto learns what the row marks",
        )


def _wanted(runs: Sequence[_Run], train_on: str | list[str]) -> list[_Run]:
    refuse_roles(train_on)
    return list(runs[-1:]) if train_on == "last" else list(runs)


def _document(ids: IntArray, runs: Sequence[_Run], limit: Limit, origin: Origin) -> Rendered:
    """A document of one segment up to the last learned run; a row that is too long keeps only whole
    runs.
    """
    # The first token has no token before it that could predict it.
    spans = [(max(start, 1), end) for start, end in runs if end > max(start, 1)]
    if not spans:
        return Rendered(None, "dropped", NO_TARGETS, len(ids), 0)
    end = spans[-1][1]
    unused = len(ids) - end
    max_length, too_long = limit
    if max_length is None or end <= max_length:
        return Rendered(_one(ids[:end], spans, origin), "trained", None, len(ids), unused)
    if too_long == "error":
        raise over_long(end, max_length)
    kept = [span for span in spans if span[1] <= max_length]
    if too_long == "drop" or not kept:
        return Rendered(None, "dropped", TOO_LONG, len(ids), 0)
    document = _one(ids[: kept[-1][1]], kept, origin)
    return Rendered(document, "truncated", TOO_LONG, len(ids), unused)


def _one(ids: IntArray, spans: Sequence[_Run], origin: Origin) -> Document:
    targets = [(start, end, 1.0, NO_MESSAGE) for start, end in spans]
    return Document((make_segment(ids, targets),), origin)


def _check_stop(ids: IntArray, runs: Sequence[_Run], template: Template, what: str) -> None:
    """Raises RowError unless the last learned run ends with a stop token."""
    if runs and int(ids[runs[-1][1] - 1]) not in template.stop_ids:
        refuse(
            "no-stop-token",
            f"the last learned {what} does not end with a stop token, so the model would never "
            "learn to stop",
            f"end it with {_stop_text(template)}",
        )


def _stop_text(template: Template) -> str:
    stops = [template.token_text(token) for token in sorted(template.stop_ids)]
    return " or ".join(stops) or "the model's end token, which its tokenizer does not name"
