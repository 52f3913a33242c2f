"""Instruction-following difficulty (IFD, arXiv 2308.12032): the loss of answers without their
prompts.

IFD (arXiv 2308.12032) is s(A|Q) / s(A): the mean loss of an answer's tokens after its prompt over
their mean loss with no prompt. Here s(A) is taken on the ids of the answer behind its *opening*
alone: what the template writes to open an answer (for ChatML `<|im_start|>assistant` and a
newline), after the BOS token where the row's path begins with one; nothing of any message before
it. Of a chat with several learned answers each is taken alone. A raw completion has no header;
where there is no BOS either, nothing could predict its first token, and that token is left out of
both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.template import Template
from tunesmith.types import Document, IntArray, Segment

_ASKED = [{"role": "user", "content": "?"}]
_VARIANTS = ({}, {"enable_thinking": False}, {"enable_thinking": True})


@dataclass(frozen=True, slots=True)
class AnswerOnly:
    """A row's answers, each a root of its own behind its opening; `unpredicted`: the (position,
    token) of targets of the row itself that have no counterpart here.
    """

    document: Document
    unpredicted: frozenset[tuple[int, int]]


def answer_headers(template: Template) -> list[list[int]]:
    """Ids that the template may open an answer with, longest first; rows may ask for a variant."""
    found: set[tuple[int, ...]] = {()}
    for kwargs in _VARIANTS if template.has_chat_template else ():
        try:
            before = template.render(_ASKED, kwargs=kwargs)
            after = template.render(_ASKED, add_generation_prompt=True, kwargs=kwargs)
        except RowError:
            continue
        if after.startswith(before):
            found.add(tuple(template.encode([after[len(before) :]])[0]))
    return sorted((list(ids) for ids in found), key=lambda ids: -len(ids))


def answers_without_prompt(
    document: Document, headers: list[list[int]], *, bos_id: int | None
) -> AnswerOnly | None:
    """The answers of a document without their prompts; None where one has no prompt to leave out,
    or its targets are not whole answers.

    `headers` as `answer_headers` gives them for a chat; [[]] for a raw completion.
    """
    roots: list[Segment] = []
    unpredicted: set[tuple[int, int]] = set()
    for number in sorted({int(m) for s in document.segments for m in s.message}):
        answer = _answer(document, number)
        if answer is None:
            return None
        segment, first, ids, weight = answer
        place = document.segments[segment].start + first
        tail = _before(document, segment, first, len(headers[0]))
        header = next((h for h in headers if tail[len(tail) - len(h) :].tolist() == h), None)
        if header is None or (not header and headers[0]):
            return None  # this turn was not opened as answers are
        opening = [*_bos(_root(document, segment), header, bos_id), *header]
        if place <= len(opening):
            return None  # there is no prompt
        skipped = 0 if opening else 1
        if skipped:
            unpredicted.add((place, int(ids[0])))
        if len(ids) > skipped:
            roots.append(_alone(opening, ids, weight, (number, skipped)))
    if not roots:
        return None
    return AnswerOnly(Document(tuple(roots), document.origin), frozenset(unpredicted))


def _answer(document: Document, number: int) -> tuple[int, int, IntArray, np.ndarray] | None:
    """(segment and index of the first target, ids, weights) of one message, if it is one run."""
    ids: list[IntArray] = []
    weights: list[np.ndarray] = []
    begin: tuple[int, int] | None = None
    expected = -1
    for at, segment in enumerate(document.segments):
        chosen = segment.message == number
        if not chosen.any():
            continue
        index = segment.index[chosen]
        begin = begin or (at, int(index[0]))
        place = segment.start + int(index[0])
        if expected not in (-1, place) or int(index[-1]) - int(index[0]) + 1 != len(index):
            return None
        expected = place + len(index)
        ids.append(segment.ids[index])
        weights.append(segment.weight[chosen])
    assert begin is not None
    return (*begin, np.concatenate(ids), np.concatenate(weights))


def _before(document: Document, segment: int, index: int, count: int) -> IntArray:
    """Up to `count` ids that stand before place `index` of a segment, on its path."""
    parts = [document.segments[segment].ids[:index]]
    held, at = index, document.segments[segment].parent
    while held < count and at >= 0:
        parts.insert(0, document.segments[at].ids)
        held += len(document.segments[at].ids)
        at = document.segments[at].parent
    return np.concatenate(parts)[max(0, held - count) :]


def _root(document: Document, segment: int) -> Segment:
    found = document.segments[segment]
    while found.parent >= 0:
        found = document.segments[found.parent]
    return found


def _bos(root: Segment, header: list[int], bos_id: int | None) -> list[int]:
    """The BOS token if the path begins with one; some families open every turn with that token."""
    if bos_id is None or int(root.ids[0]) != bos_id or header[:1] == [bos_id]:
        return []
    return [bos_id]


def _alone(
    opening: list[int], ids: IntArray, weight: np.ndarray, message: tuple[int, int]
) -> Segment:
    number, skipped = message
    count = len(ids) - skipped
    return Segment(
        ids=np.concatenate([np.array(opening, np.int32), ids]),
        parent=-1,
        start=0,
        index=np.arange(len(opening) + skipped, len(opening) + len(ids), dtype=np.int32),
        weight=weight[skipped:],
        message=np.full(count, number, np.int32),
    )
