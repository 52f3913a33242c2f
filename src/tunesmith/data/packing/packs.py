"""Sequence packing of prepared documents (bin packing by best-fit decreasing, arXiv 2404.10830).

Documents that packing cuts are replaced in place, and the ledger is amended by what the cut lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.packing.pieces import Pieces
from tunesmith.data.packing.strategies import Numbers, Spans, split, wrap
from tunesmith.data.preprocess.document_store import (
    longest_paths,
    source_numbers,
    target_counts,
    token_counts,
)
from tunesmith.data.preprocess.ledger import HELD_OUT, Ledger
from tunesmith.data.preprocess.prepare import UNUSED, Prepared
from tunesmith.errors import DataError
from tunesmith.types import Document

CUT = "cut where a pack ends"
WRAPPED = "wrapped"


@dataclass(frozen=True, slots=True)
class Packing:
    """How documents were packed, and what that cut. Counts are of rows, tokens and targets."""

    kind: str  # bfd, bfd_split or wrapped
    capacity: int  # largest number of tokens of a pack
    given: Sequence[Document]  # the documents before packing
    first: Numbers  # for each of them the index of its first piece, -1 if none is left
    cut: int  # rows in several pieces, or with tokens lost
    lost: int  # tokens in no piece
    unlearned: int  # targets that are no longer targets
    learned: int  # first tokens of texts that became targets


def make_packs(prepared: Prepared, *, kind: str, capacity: int) -> Packing:
    """Cut (or with `wrapped` join) the prepared documents in place, and amend their ledger.

    `bfd` truncates documents to the length of a pack, `bfd_split` splits them, `wrapped` cuts the
    stream of all documents after every `capacity` tokens. Pieces without a target are left out,
    since nothing is learned from them.

    Raises:
        DataError: a document that branches would be cut, or no piece has a target.
    """
    documents = prepared.documents
    lengths = token_counts(documents).astype(np.int64)
    _refuse_branches(documents, lengths, kind=kind, capacity=capacity)
    if kind != WRAPPED and int(lengths.max()) <= capacity:
        return Packing(kind, capacity, documents, np.arange(len(lengths)), 0, 0, 0, 0)
    if kind == WRAPPED:
        spans, packs = wrap(lengths, capacity)
        bounds = packs.bounds
    else:
        spans = _shortened(lengths, capacity) if kind == "bfd" else split(lengths, capacity)
        bounds = np.arange(len(spans.item) + 1)
    pieces = Pieces(documents, spans, bounds)
    kept = _with_targets(pieces, documents, spans, bounds)
    packing = _enter(prepared.ledger, documents, kept, kind=kind, capacity=capacity)
    if not len(kept):
        raise DataError(
            "no piece of a document has a target",
            where="batch.packing",
            hint="packs of more tokens, with batch.pack_tokens",
        )
    prepared.documents = kept
    return packing


def _refuse_branches(
    documents: Sequence[Document], lengths: Numbers, *, kind: str, capacity: int
) -> None:
    """Refuse documents that branch and would be cut: a stream has no branches, and a tree that is
    cut is another conversation.
    """
    branched = longest_paths(documents) != lengths
    if kind != WRAPPED:
        branched &= lengths > capacity
    found = np.flatnonzero(branched)
    if not len(found):
        return
    most = int(lengths[found].max())
    why = (
        "a document that branches can't stand in one stream"
        if kind == WRAPPED
        else f"a document that branches can't be cut to packs of {capacity} tokens"
    )
    raise DataError(
        f"{why}: {len(found):,} of {len(lengths):,} branch, with up to {most:,} tokens; their "
        "template rewrites earlier turns, or a few answers share a prompt",
        where=str(documents[int(found[0])].origin),
        hint=f"batch.packing=bfd with batch.pack_tokens={most}, or data.train_on=last",
    )


def _shortened(lengths: Numbers, capacity: int) -> Spans:
    ends = np.minimum(lengths, capacity)
    return Spans(np.arange(len(lengths)), np.zeros_like(ends), ends)


def _with_targets(
    pieces: Pieces, documents: Sequence[Document], spans: Spans, bounds: Numbers
) -> Pieces:
    """The pieces that have at least one target."""
    keep = pieces.target_tokens > 0
    if keep.all():
        return pieces
    inside = np.repeat(keep, np.diff(bounds))
    left = Spans(spans.item[inside], spans.start[inside], spans.end[inside])
    ends = np.cumsum(np.diff(bounds)[keep])
    return Pieces(documents, left, np.concatenate([np.zeros(1, np.int64), ends]))


def _enter(
    ledger: Ledger, documents: Sequence[Document], pieces: Pieces, *, kind: str, capacity: int
) -> Packing:
    """Enter in the ledger what the pieces hold of each document."""
    whole, targets = (count(documents).astype(np.int64) for count in (token_counts, target_counts))
    item, piece = pieces.owners()
    tokens = np.bincount(item, weights=pieces.span_tokens, minlength=len(whole)).astype(np.int64)
    learned = np.bincount(item, weights=pieces.span_targets, minlength=len(whole)).astype(np.int64)
    first = np.full(len(whole), -1, np.int64)
    # Assigned in reverse order, so that the first piece of each document is written last.
    first[item[::-1]] = piece[::-1]
    lost, changed = whole - tokens, learned - targets
    gone = learned == 0
    _move(ledger, documents, (lost == 0) & ~gone, changed)
    truncated = _truncated_rows(ledger)
    for number in map(int, np.flatnonzero((lost > 0) | gone)):
        origin = documents[number].origin
        fewer = int(targets[number] - learned[number])
        cut = int(whole[number] if gone[number] else lost[number])
        ledger.take_back(
            origin, targets=fewer, context=cut - fewer, reason=CUT, whole=bool(gone[number]),
            truncated=(origin.source, origin.row) in truncated,
        )  # fmt: skip
    ledger.check()
    split = np.bincount(item, minlength=len(whole)) > 1
    return Packing(
        kind=kind,
        capacity=capacity,
        given=documents,
        first=first,
        cut=int((split | (lost > 0) | gone).sum()),
        lost=int(lost.sum()),
        unlearned=int(-changed[changed < 0].sum()),
        learned=int(changed[changed > 0].sum()),
    )


def _move(
    ledger: Ledger, documents: Sequence[Document], whole: NDArray[np.bool_], changed: Numbers
) -> None:
    """Enter targets that became context, or the other way round, in documents that lost no
    token.
    """
    names, numbers = source_numbers(documents)
    moved = np.where(whole, changed, 0)
    for number, name in enumerate(names):
        ledger.relearn(name, targets=int(moved[numbers == number].sum()))


def _truncated_rows(ledger: Ledger) -> set[tuple[str, int]]:
    """Rows that were truncated before packing; held-out rows and unused tokens are no
    truncation.
    """
    return {
        (source, row)
        for source, reasons in ledger.reasons.items()
        for reason, entry in reasons.items()
        if reason not in (UNUSED, HELD_OUT)
        for row in entry.rows
    }
