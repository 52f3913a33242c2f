"""Lengths into packs: the same packs as TRL's, token by token, and properties of any packing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.packing.strategies import Packs, Spans, best_fit, split, wrap

LENGTHS = st.lists(st.integers(1, 70), min_size=0, max_size=120)
CAPACITY = st.integers(1, 40)


def tokens_of(lengths: list[int]) -> list[list[tuple[int, int]]]:
    return [[(item, at) for at in range(length)] for item, length in enumerate(lengths)]


def laid_out(spans: Spans, packs: Packs) -> list[list[tuple[int, int]]]:
    """The tokens of each pack, named by item and place."""
    pieces = list(zip(spans.item.tolist(), spans.start.tolist(), spans.end.tolist(), strict=True))
    return [
        [(pieces[n][0], at) for n in packs.pack(k) for at in range(pieces[n][1], pieces[n][2])]
        for k in range(len(packs))
    ]


def whole(lengths: list[int]) -> Spans:
    ends = np.array(lengths, np.int64)
    return Spans(np.arange(len(ends)), np.zeros_like(ends), ends)


def trl_packs(lengths: list[int], capacity: int, strategy: str) -> list[list[tuple[int, int]]]:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    datasets.disable_progress_bars()
    named = [[item * 1000 + at for at in range(length)] for item, length in enumerate(lengths)]
    packed = trl.pack_dataset(
        datasets.Dataset.from_dict({"input_ids": named}), seq_length=capacity, strategy=strategy
    )
    return [[divmod(name, 1000) for name in pack] for pack in packed["input_ids"]]


def ours(lengths: list[int], capacity: int, strategy: str) -> list[list[tuple[int, int]]]:
    if strategy == "wrapped":
        return laid_out(*wrap(lengths, capacity))
    if strategy == "bfd":
        spans = whole(np.minimum(lengths, capacity).tolist())
    else:
        spans = split(lengths, capacity)
    return laid_out(spans, best_fit(spans.lengths, capacity))


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("seed", range(8))
def test_packs_are_those_of_trl(strategy: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(2, 90))
    lengths = rng.integers(1, 3 * capacity, int(rng.integers(1, 400))).tolist()
    assert ours(lengths, capacity, strategy) == trl_packs(lengths, capacity, strategy)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("bfd", [[(0, 0), (0, 1), (0, 2), (0, 3)], [(2, 0), (2, 1), (2, 2), (3, 0)],
                 [(1, 0), (1, 1)]]),
        ("bfd_split", [[(0, 0), (0, 1), (0, 2), (0, 3)], [(2, 0), (2, 1), (2, 2), (0, 4)],
                       [(1, 0), (1, 1), (3, 0)]]),
        ("wrapped", [[(0, 0), (0, 1), (0, 2), (0, 3)], [(0, 4), (1, 0), (1, 1), (2, 0)],
                     [(2, 1), (2, 2), (3, 0)]]),
    ],
)  # fmt: skip
def test_the_published_example(strategy: str, expected: list[list[tuple[int, int]]]) -> None:
    assert ours([5, 2, 3, 1], 4, strategy) == expected


@settings(deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITY)
def test_best_fit_places_every_item_once_and_overfills_nothing(
    lengths: list[int], capacity: int
) -> None:
    sizes = np.minimum(lengths, capacity).astype(np.int64)
    packs = best_fit(sizes, capacity)
    assert sorted(packs.items.tolist()) == list(range(len(lengths)))
    assert packs.tokens.tolist() == [int(sizes[packs.pack(k)].sum()) for k in range(len(packs))]
    assert all(0 < tokens <= capacity for tokens in packs.tokens)
    # Two packs that would fit into one are never left.
    if len(packs) > 1:
        assert sum(sorted(packs.tokens.tolist())[:2]) > capacity


@settings(deadline=None)
@given(lengths=LENGTHS, capacity=CAPACITY)
def test_cut_pieces_are_the_tokens_in_order(lengths: list[int], capacity: int) -> None:
    tokens = [token for item in tokens_of(lengths) for token in item]
    spans, packs = wrap(lengths, capacity)
    cut = laid_out(spans, packs)
    assert [token for pack in cut for token in pack] == tokens
    assert all(len(pack) == capacity for pack in cut[:-1])
    pieces = split(lengths, capacity)
    assert [
        (item, at)
        for item, start, end in zip(pieces.item, pieces.start, pieces.end, strict=True)
        for at in range(start, end)
    ] == tokens
    assert pieces.lengths.max(initial=0) <= capacity


@pytest.mark.parametrize("lengths", [[3, 0], [3, 9]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths from 1 to 8"):
        best_fit(lengths, 8)
