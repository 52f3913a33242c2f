"""Documents cut and joined by packing: which tokens and targets are left, and that they add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.packing.packs import Packing, make_packs
from tunesmith.data.preprocess.document_store import (
    Documents,
    StoreWriter,
    longest_paths,
    pack,
    token_counts,
)
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.data.preprocess.prepare import Prepared
from tunesmith.errors import DataError
from tunesmith.types import Document, Origin, Segment


def line(number: int, cuts: list[int], targets: set[int]) -> Document:
    """A document of one path, in segments that end at `cuts`; token k has id 1000 * number + k."""
    segments: list[Segment] = []
    start = 0
    for place, end in enumerate(cuts):
        index = np.array([t - start for t in sorted(targets) if start <= t < end], np.int32)
        segments.append(
            Segment(
                ids=np.arange(1000 * number + start, 1000 * number + end, dtype=np.int32),
                parent=place - 1,
                start=start,
                index=index,
                weight=np.full(len(index), 1.0 + number, np.float32),
                message=np.full(len(index), place, np.int32),
            )
        )
        start = end
    return Document(tuple(segments), Origin("made.jsonl", number))


@st.composite
def lines(draw: st.DrawFn) -> list[Document]:
    found: list[Document] = []
    for number in range(draw(st.integers(1, 12))):
        length = draw(st.integers(2, 30))
        cuts = [*sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))), length]
        targets = draw(
            st.one_of(
                st.just(set(range(1, length))),
                st.sets(st.integers(1, length - 1), min_size=1, max_size=length - 1),
            )
        )
        found.append(line(number, cuts, targets))
    return found


def prepared_of(documents: list[Document], *, stored: bool = False) -> Prepared:
    ledger = Ledger()
    for document in documents:
        targets = document.target_tokens
        ledger.add_trained(
            document.origin,
            tokens=document.tokens,
            targets=targets,
            context=document.tokens - targets,
        )
    if stored:
        writer = StoreWriter()
        writer.add(pack(documents))
        return Prepared(Documents(writer.finish()), ledger, {}, "", [])
    return Prepared(documents, ledger, {}, "", [])


def tokens_of(document: Document) -> list[int]:
    return [int(token) for segment in document.segments for token in segment.ids]


def targets_of(document: Document) -> list[tuple[int, float]]:
    """(id, weight) of each target of a line."""
    return [
        (int(segment.ids[at]), float(weight))
        for segment in document.segments
        for at, weight in zip(segment.index, segment.weight, strict=True)
    ]


def expected(documents: list[Document], kind: str, capacity: int) -> list[tuple[list, list]]:
    """Tokens and targets of each piece, token by token."""
    rows: list[list[tuple[int, float, bool]]] = []
    for document in documents:
        weights = dict(targets_of(document))
        ids = tokens_of(document)
        learned_whole = len(weights) == len(ids) - 1
        first = [(ids[0], weights[ids[1]] if learned_whole else 0.0, learned_whole)]
        rows.append(first + [(token, weights.get(token, 0.0), True) for token in ids[1:]])
    if kind == "wrapped":
        stream = [token for row in rows for token in row]
        chunks = [stream[at : at + capacity] for at in range(0, len(stream), capacity)]
    elif kind == "bfd":
        chunks = [row[:capacity] for row in rows]
    else:
        chunks = [row[at : at + capacity] for row in rows for at in range(0, len(row), capacity)]
    found = [
        (
            [token for token, _, _ in chunk],
            [(token, weight) for token, weight, learned in chunk[1:] if weight and learned],
        )
        for chunk in chunks
    ]
    return [one for one in found if one[1]]


def made(documents: list[Document], kind: str, capacity: int, *, stored: bool) -> Prepared | None:
    prepared = prepared_of(documents, stored=stored)
    try:
        make_packs(prepared, kind=kind, capacity=capacity)
    except DataError as error:
        if "no piece" in error.message:
            return None
        raise
    return prepared


@settings(max_examples=150, deadline=None)
@given(
    documents=lines(),
    kind=st.sampled_from(["bfd", "bfd_split", "wrapped"]),
    capacity=st.integers(2, 40),
    stored=st.booleans(),
)
def test_pieces_hold_the_tokens_and_targets_that_the_rule_leaves(
    documents: list[Document], kind: str, capacity: int, stored: bool
) -> None:
    wanted = expected(documents, kind, capacity)
    prepared = made(documents, kind, capacity, stored=stored)
    if prepared is None:
        assert not wanted
        return
    pieces = list(prepared.documents)
    assert [(tokens_of(one), targets_of(one)) for one in pieces] == wanted
    for piece in pieces:
        at = 0
        for segment in piece.segments:
            assert segment.start == at
            at += len(segment.ids)
    assert token_counts(prepared.documents).tolist() == [one.tokens for one in pieces]
    assert longest_paths(prepared.documents).tolist() == [one.longest_path for one in pieces]


@settings(max_examples=150, deadline=None)
@given(
    documents=lines(),
    kind=st.sampled_from(["bfd", "bfd_split", "wrapped"]),
    capacity=st.integers(2, 40),
)
def test_the_ledger_adds_up_and_counts_the_targets_that_are_left(
    documents: list[Document], kind: str, capacity: int
) -> None:
    prepared = made(documents, kind, capacity, stored=True)
    if prepared is None:
        return
    prepared.ledger.check()
    total = prepared.ledger.totals
    assert total.rows == len(documents)
    assert total.tokens == sum(document.tokens for document in documents)
    assert total.tokens_trained == sum(one.target_tokens for one in prepared.documents)
    learned = {origin.row for origin in (one.origin for one in prepared.documents)}
    if kind != "wrapped":
        assert total.rows_dropped == len(documents) - len(learned)
        left = sum(one.tokens for one in prepared.documents)
        assert total.tokens_trained + total.tokens_context == left


def test_what_fits_is_left_as_it_is() -> None:
    documents = [line(0, [4, 9], {8}), line(1, [5], {3, 4})]
    for kind in ("bfd", "bfd_split"):
        prepared = prepared_of(documents)
        packing: Packing = make_packs(prepared, kind=kind, capacity=9)
        assert prepared.documents is documents
        assert (packing.cut, packing.lost) == (0, 0)


def test_what_is_cut_off_is_in_the_ledger_with_its_reason() -> None:
    prepared = prepared_of([line(0, [10], {6, 9}), line(1, [10], {9}), line(2, [4], {3})])
    packing = make_packs(prepared, kind="bfd", capacity=8)
    assert (packing.cut, packing.lost, packing.unlearned) == (2, 12, 2)
    assert packing.first.tolist() == [0, -1, 1]
    total = prepared.ledger.totals
    assert (total.rows_trained, total.rows_truncated, total.rows_dropped) == (1, 1, 1)
    assert (total.tokens_truncated, total.tokens_dropped) == (2, 10)
    reason = prepared.ledger.reasons["made.jsonl"]["cut where a pack ends"]
    assert (reason.rows, reason.tokens) == ([0, 1], 12)


def branched() -> Document:
    one = line(0, [4], {3})
    more = [
        Segment(np.arange(9, dtype=np.int32), 0, 4, *(a[:0] for a in (
            np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int32)
        )))
        for _ in range(2)
    ]  # fmt: skip
    return Document((*one.segments, *more), one.origin)


@pytest.mark.parametrize(("kind", "capacity"), [("bfd", 21), ("bfd_split", 13), ("wrapped", 64)])
def test_a_document_that_branches_is_not_cut(kind: str, capacity: int) -> None:
    with pytest.raises(DataError, match="branches") as caught:
        make_packs(prepared_of([line(1, [5], {4}), branched()]), kind=kind, capacity=capacity)
    assert caught.value.where == "made.jsonl:0"
    assert "batch.pack_tokens=22" in (caught.value.hint or "")


def test_a_document_that_branches_is_packed_where_it_fits() -> None:
    documents = [line(1, [5], {4}), branched()]
    prepared = prepared_of(documents)
    make_packs(prepared, kind="bfd", capacity=22)
    assert prepared.documents is documents
