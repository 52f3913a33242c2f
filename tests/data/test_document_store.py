"""Documents in arrays: what goes in comes out, in memory and from files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.preprocess.document_store import (
    Documents,
    StoreWriter,
    longest_paths,
    pack,
    target_counts,
    token_counts,
)
from tunesmith.types import Document, Origin, Segment


@st.composite
def segments(draw, number):
    size = draw(st.integers(1, 6))
    places = sorted(draw(st.sets(st.integers(0, size - 1), max_size=size)))
    values = st.lists(
        st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([-1, 0, 3])),
        min_size=len(places),
        max_size=len(places),
    )
    marks = draw(values)
    return Segment(
        ids=np.array(draw(st.lists(st.integers(0, 99), min_size=size, max_size=size)), np.int32),
        parent=draw(st.integers(-1, number - 1)),
        start=draw(st.integers(0, 9)),
        index=np.array(places, np.int32),
        weight=np.array([weight for weight, _ in marks], np.float32),
        message=np.array([message for _, message in marks], np.int32),
    )


@st.composite
def documents(draw):
    count = draw(st.integers(1, 3))
    return Document(
        tuple(draw(segments(number)) for number in range(count)),
        Origin(draw(st.sampled_from(["a.jsonl", "b.jsonl"])), draw(st.integers(0, 2**40))),
    )


def same(one, other):
    if one.origin != other.origin or len(one.segments) != len(other.segments):
        return False
    for a, b in zip(one.segments, other.segments, strict=True):
        if (a.parent, a.start) != (b.parent, b.start):
            return False
        for name in ("ids", "index", "weight", "message"):
            left, right = getattr(a, name), getattr(b, name)
            if left.dtype != right.dtype or left.tolist() != right.tolist():
                return False
    return True


@settings(max_examples=150, deadline=None)
@given(batches=st.lists(st.lists(documents(), max_size=4), max_size=4), on_disk=st.booleans())
def test_what_goes_in_comes_out(tmp_path_factory, batches, on_disk):
    writer = StoreWriter(tmp_path_factory.mktemp("store") if on_disk else None)
    for batch in batches:
        writer.add(pack(batch))
    stored = Documents(writer.finish())
    given_in = [document for batch in batches for document in batch]
    assert len(stored) == len(given_in)
    assert all(same(a, b) for a, b in zip(stored, given_in, strict=True))
    for count in (token_counts, target_counts, longest_paths):
        assert count(stored).tolist() == count(given_in).tolist()


def test_it_is_a_sequence():
    row = Segment(
        ids=np.array([5, 6], np.int32),
        parent=-1,
        start=0,
        index=np.array([1], np.int32),
        weight=np.ones(1, np.float32),
        message=np.zeros(1, np.int32),
    )
    given_in = [Document((row,), Origin("a", number)) for number in range(5)]
    stored = Documents(pack(given_in))
    assert same(stored[-1], given_in[-1])
    assert [one.origin.row for one in stored[1:4:2]] == [1, 3]
    assert [one.origin.row for one in stored] == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        stored[5]
    with pytest.raises(ValueError, match="read-only"):
        Documents(mapped(given_in))[0].segments[0].ids[0] = 9


def mapped(given_in):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        writer = StoreWriter(Path(folder))
        writer.add(pack(given_in))
        return writer.finish()
