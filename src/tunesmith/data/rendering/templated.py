"""Rows of text to which a chat template was applied already: the assistant's answers are found and
learned.

Targets, and the ids before them, are those of the same conversation given as messages.
"""

from __future__ import annotations

import numpy as np

from tunesmith.data.formats.examples import TemplatedText
from tunesmith.data.rendering.pretokenized import refuse_roles
from tunesmith.data.rendering.result import Limit, Rendering
from tunesmith.data.rendering.token_paths import TokenPath, fit_paths, fit_stream
from tunesmith.data.row_errors import refuse
from tunesmith.data.templates.template import Template
from tunesmith.data.templates.turn_pattern import TurnPattern, answer_end, find_turn_pattern
from tunesmith.types import NO_MESSAGE, Origin

_SHOWN = 40
_OTHER_TEMPLATE = "if another model's template wrote the text: data.template=FOLDER or FILE"
_Span = tuple[int, int]
"""Characters [start, end) of an answer, with its stop token."""


def render_templated(
    example: TemplatedText,
    template: Template,
    train_on: str | list[str],
    limit: Limit,
    origin: Origin,
) -> Rendering:
    """Render a conversation that a template has written; the answers are the targets.

    An answer reaches from the template's generation prompt to the next stop token, which is part of
    it. As at inference, the text before it is tokenized apart from it.

    Raises:
        RowError: the template does not write such a text, or its answers are not what the model
            must generate.
    """
    text, spans = find_answers(example, template, last_only=train_on in ("last", "all"))
    refuse_roles(train_on)
    if train_on == "all":
        (whole,) = yield [(text, False)]
        return fit_stream(whole, 1, limit, origin)
    texts = [piece for start, end in spans for piece in (text[:start], text[start:end])]
    rest = text[spans[-1][1] :]
    ids = yield [(piece, False) for piece in (*texts, rest)]
    paths: list[TokenPath] = []
    for prompt, target in zip(ids[:-1:2], ids[1::2], strict=True):
        path = np.concatenate([prompt, target])
        paths.append(TokenPath(path, len(prompt), len(path), 1.0, NO_MESSAGE))
    return fit_paths(paths, limit, origin, unused=len(ids[-1]))


def find_answers(
    example: TemplatedText, template: Template, *, last_only: bool = False
) -> tuple[str, list[_Span]]:
    """The text, with the template's beginning, and the spans of its answers.

    Raises:
        RowError: as `render_templated`.
    """
    pattern = find_turn_pattern(template)
    text = example.text
    if not text.startswith(pattern.begins):
        text = pattern.begins + text  # whoever wrote the text left BOS to the tokenizer
    starts = _openings(text, pattern)
    if not starts:
        refuse(
            "no-turn-marker",
            f"the text never opens an answer with {pattern.opening!r}, as the chat template does",
            _OTHER_TEMPLATE,
        )
    _check_pieces(text, pattern)
    ends = [answer_end(text, start, template) for start in starts]
    at_end = ends[-1] is None or not text[ends[-1] :].strip()
    if pattern.rewrites and not (at_end and (last_only or len(starts) == 1)):
        refuse(
            "rewritten-history",
            f"the text holds {len(starts)} answers, and the chat template rewrites all but one at "
            "the end, so the others don't stand there as the model must write them",
            "data.train_on=last learns the answer at the end; rows of messages teach them all",
        )
    spans: list[_Span] = []
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        limit = starts[number + 1] if number + 1 < len(starts) else len(text)
        if end is None or end > limit:
            if last_only and pattern.rewrites and number + 1 < len(starts):
                continue  # an earlier answer is rendered with another end, and it is not learned
            shown = text[start:limit][-_SHOWN:]
            refuse(
                "no-stop-token",
                f"answer {number} has no stop token: {shown!r}",
                "an answer ends as the chat template ends it; take out rows that are cut off",
            )
        spans.append((start, end))
    spans = spans[-1:] if last_only else spans
    _check_answers(text, spans, pattern, opened=len(starts), last_only=last_only)
    return text, spans


def _openings(text: str, pattern: TurnPattern) -> list[int]:
    """The places where answers begin, after their generation prompt."""
    places: list[int] = []
    key, at = pattern.anchor + pattern.opening, 0
    while (at := text.find(key, at)) >= 0:
        at += len(key)
        places.append(at)
    return places


def _check_pieces(text: str, pattern: TurnPattern) -> None:
    """Raises RowError if a control token is at a place where the template writes none."""
    odd = pattern.odd_piece(text)
    if odd is None:
        return
    before, between, after = odd
    shown = between if len(between) <= _SHOWN else f"{between[:_SHOWN]}..."
    place = f"after {before!r} and {shown!r}" if before else f"after {shown!r} at its beginning"
    refuse(
        "special-token-in-content",
        f"the text holds {after!r} {place}, where the chat template never writes it",
        f"a content that quotes a control token can't be told from one; take it out. "
        f"{_OTHER_TEMPLATE}",
    )


def _check_answers(
    text: str, spans: list[_Span], pattern: TurnPattern, *, opened: int, last_only: bool
) -> None:
    answers = pattern.answers(text)
    if answers != opened and not (last_only and pattern.answers(text[spans[-1][0] :]) == 0):
        refuse(
            "generation-prompt-mismatch",
            f"{answers - opened} of {answers} answers begin with {pattern.header!r}, but the model "
            f"is asked for one with {pattern.opening!r}",
            "give data.template_kwargs='{enable_thinking: false}' if the template knows it",
        )
    for number, (start, end) in enumerate(spans):
        if not pattern.tokens.sub("", text[start:end]).strip():
            refuse(
                "empty-answer",
                f"answer {number} is empty, so there is nothing to learn",
                "take the row out",
            )
