import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.packing.strategies import best_fit
from tunesmith.data.sampling.mixture import Portion, mix
from tunesmith.data.sampling.prefix_groups import BLOCK, PrefixGroups
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.types import Document, Origin, Segment

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)
sizes = st.one_of(
    st.fixed_dictionaries({"documents": st.integers(1, 12)}),
    st.fixed_dictionaries({"tokens": st.integers(1, 120)}),
)


@settings(deadline=None)
@given(lengths=lengths, size=sizes, seed=st.integers(0, 2**32 - 1), shuffle=st.booleans())
def test_every_document_once_an_epoch(lengths, size, seed, shuffle):
    order = BatchSampler(lengths, **size, seed=seed, shuffle=shuffle)
    step = 0
    for epoch in range(3):
        seen = []
        while len(seen) < len(lengths):
            indices = order.step_indices(step).tolist()
            seen += indices
            assert order.epoch_after(step) == epoch + len(seen) / len(lengths)
            step += 1
        assert sorted(seen) == list(range(len(lengths)))
        assert order.total_steps(epoch + 1) == step


@settings(deadline=None)
@given(lengths=lengths, tokens=st.integers(1, 120), seed=st.integers(0, 99))
def test_a_step_stops_as_soon_as_it_has_its_tokens(lengths, tokens, seed):
    order = BatchSampler(lengths, tokens=tokens, seed=seed, shuffle=True)
    for step in range(order.steps_per_epoch):
        sizes = [lengths[n] for n in order.step_indices(step)]
        assert sum(sizes[:-1]) < tokens
        assert sum(sizes) >= tokens or step == order.steps_per_epoch - 1


@settings(deadline=None)
@given(lengths=lengths, size=sizes, steps=st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_step_depends_on_its_number_alone(lengths, size, steps):
    walked = BatchSampler(lengths, **size, seed=7, shuffle=True)
    in_order = [walked.step_indices(step).tolist() for step in range(max(steps) + 1)]
    asked = BatchSampler(lengths, **size, seed=7, shuffle=True)
    for step in steps:
        assert asked.step_indices(step).tolist() == in_order[step]


def test_orders_differ_by_epoch_and_seed_and_are_int32():
    order = BatchSampler([1] * 50, documents=50, seed=1, shuffle=True)
    other = BatchSampler([1] * 50, documents=50, seed=2, shuffle=True)
    assert order.step_indices(0).dtype == np.int32
    assert order.step_indices(0).tolist() != order.step_indices(1).tolist()
    assert order.step_indices(0).tolist() != other.step_indices(0).tolist()


def test_without_shuffling_the_order_is_the_data_s():
    order = BatchSampler([1] * 5, documents=2, seed=1, shuffle=False)
    steps = [order.step_indices(step).tolist() for step in range(6)]
    assert steps == [[0, 1], [2, 3], [4]] * 2


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.1, 1), (0.5, 5), (1, 10), (2.25, 23)])
def test_shares_of_an_epoch_round_up_to_whole_steps(epochs, steps):
    assert BatchSampler([3] * 100, documents=10, seed=0, shuffle=True).total_steps(epochs) == steps
    assert BatchSampler([3] * 100, tokens=30, seed=0, shuffle=True).total_steps(epochs) == steps


@pytest.mark.parametrize("size", [{}, {"documents": 1, "tokens": 1}, {"documents": 0}])
def test_one_size_is_needed(size):
    with pytest.raises(ValueError, match="step"):
        BatchSampler([1], **size, seed=0, shuffle=False)


def test_the_order_of_a_seed_never_changes():
    order = BatchSampler([1] * 8, documents=8, seed=42, shuffle=True)
    for epoch in range(3):
        wanted = np.random.Generator(np.random.PCG64((42, epoch))).permutation(8)
        assert order.step_indices(epoch).tolist() == wanted.tolist()
    assert order.step_indices(0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]


@settings(deadline=None)
@given(lengths=lengths, size=sizes, seed=st.integers(0, 99), shuffle=st.booleans())
def test_a_step_of_packs_has_whole_packs_and_an_epoch_has_each_once(lengths, size, seed, shuffle):
    order = BatchSampler(lengths, **size, seed=seed, shuffle=shuffle, pack_tokens=50)
    packs = best_fit(lengths, 50)
    wanted = sorted(tuple(packs.pack(k).tolist()) for k in range(len(packs)))
    for epoch in range(2):
        first, end = order.total_steps(epoch) if epoch else 0, order.total_steps(epoch + 1)
        found = []
        for step in range(first, end):
            rest = tuple(order.step_indices(step).tolist())
            inside = []
            while rest:
                pack = next(one for one in wanted if rest[: len(one)] == one)
                inside.append(pack)
                rest = rest[len(pack) :]
            if "documents" in size and step < end - 1:
                assert len(inside) == size["documents"]
            if "tokens" in size:
                sums = [sum(lengths[n] for n in pack) for pack in inside]
                assert sum(sums[:-1]) < size["tokens"]
            found += inside
            assert order.epoch_of(step) == epoch
        assert sorted(found) == wanted
        assert order.epoch_after(end - 1) == epoch + 1


@settings(deadline=None)
@given(lengths=lengths, steps=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_step_of_packs_over_a_mixture_depends_on_its_number_alone(lengths, steps):
    half = len(lengths) // 2
    if not half:
        return
    parts = [np.arange(half, dtype=np.int32), np.arange(half, len(lengths), dtype=np.int32)]
    portions = [
        Portion(f"s{n}", part, tokens=sum(lengths[k] for k in part), weight=n + 1.0)
        for n, part in enumerate(parts)
    ]

    def made():
        mixture = mix(portions, seed=3, shuffle=True)
        order = BatchSampler(
            lengths, documents=2, seed=3, shuffle=True, mixture=mixture, pack_tokens=60
        )
        return order, mixture

    walked, mixture = made()
    in_order = [walked.step_indices(step).tolist() for step in range(max(steps) + 1)]
    for step in steps:
        assert made()[0].step_indices(step).tolist() == in_order[step]
    whole = [n for step in range(walked.total_steps(1)) for n in walked.step_indices(step)]
    assert sorted(whole) == sorted(mixture.order(0).tolist())


def beginning(prefix: list[int], number: int) -> Document:
    """A document of a prefix and a few tokens of its own."""
    ids = np.array([*prefix, 10_000 + number, 20_000 + number], np.int32)
    index = np.array([len(ids) - 1], np.int32)
    segment = Segment(ids, -1, 0, index, np.ones(1, np.float32), np.zeros(1, np.int32))
    return Document((segment,), Origin("made", number))


@settings(deadline=None)
@given(
    groups=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_grouped_steps_hold_each_document_once_and_groups_together(groups, size, seed):
    prefixes = [[100 + number] * (BLOCK + number) for number in range(len(groups))]
    owner = [number for number, count in enumerate(groups) for _ in range(count)]
    owner = np.random.default_rng(seed).permutation(owner).tolist()
    documents = [beginning(prefixes[group], number) for number, group in enumerate(owner)]
    order = BatchSampler(
        [d.tokens for d in documents], documents=size, seed=seed, shuffle=True,
        groups=PrefixGroups(documents),
    )  # fmt: skip
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        steps = [order.step_indices(first + n).tolist() for n in range(order.steps_per_epoch)]
        assert sorted(n for step in steps for n in step) == list(range(len(documents)))
        # A group is in no more steps than a run of its length can reach.
        for group, count in enumerate(groups):
            met = sum(any(owner[n] == group for n in step) for step in steps)
            assert met <= (count - 1 + size - 1) // size + 1


def test_longer_prefixes_bring_documents_together_inside_of_shorter_ones():
    system, one, other = [1] * BLOCK, [2] * BLOCK, [3] * BLOCK
    documents = [beginning(system + (one if n % 2 else other), n) for n in range(8)]
    documents += [beginning([n], 100 + n) for n in range(8)]
    groups = PrefixGroups(documents)
    assert groups.grouped == 8
    seen = set()
    for seed in range(20):
        order = groups.order((seed, 0)).tolist()
        shared = [n for n in order if n < 8]
        at = order.index(shared[0])
        assert order[at : at + 8] == shared
        assert {n % 2 for n in shared[:4]} in ({0}, {1})
        assert sorted(order) == list(range(16))
        assert order == groups.order((seed, 0)).tolist()
        seen.add(tuple(order))
    assert len(seen) == 20
