import numpy as np
import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st

from tunesmith.data.sampling.mixture import Mixture, Portion, mix
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.errors import DataError

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6)
seeds = st.integers(0, 2**32 - 1)


def given(**strategies):
    def decorate(test):
        return settings(deadline=None, max_examples=50)(hypothesis_given(**strategies)(test))

    return decorate


def portions(counts, *, weights=None, epochs=None, lengths=None) -> list[Portion]:
    """Sources with consecutive documents; `lengths` are the tokens of all documents."""
    made, start = [], 0
    for source, count in enumerate(counts):
        numbers = np.arange(start, start + count, dtype=np.int32)
        start += count
        made.append(
            Portion(
                f"s{source}",
                numbers,
                tokens=sum(lengths[n] for n in numbers) if lengths else 10 * count,
                weight=weights[source] if weights else None,
                epochs=epochs[source] if epochs else 1.0,
            )
        )
    return made


def owner(counts) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


@st.composite
def weighted(draw):
    counts = draw(sizes)
    weight = st.one_of(st.floats(0.2, 5), st.integers(1, 9).map(float))
    weights = draw(st.lists(weight, min_size=len(counts), max_size=len(counts)))
    return counts, weights


@given(case=weighted(), seed=seeds, shuffle=st.booleans())
def test_every_source_is_near_its_weight_after_any_number_of_documents(case, seed, shuffle):
    counts, weights = case
    mixture = mix(portions(counts, weights=weights), seed=seed, shuffle=shuffle)
    stream = np.concatenate([mixture.order(number) for number in range(3)])[:3000]
    sources = owner(counts)[stream]
    for source, weight in enumerate(weights):
        seen = np.cumsum(sources == source)
        wanted = np.arange(1, len(stream) + 1) * weight / sum(weights)
        bound = mixture.deviation_bound(source)
        assert bound <= {1: 0, 2: 0.5, 3: 1.0}.get(len(counts), 1.68)
        assert np.abs(seen - wanted).max() <= bound + 1e-5
        for places in (1, len(stream) // 2, len(stream)):
            assert mixture.counts(places)[source] == seen[places - 1]


@given(case=weighted(), seed=seeds)
def test_a_source_s_own_pass_visits_all_of_it_before_any_is_repeated(case, seed):
    counts, weights = case
    mixture = mix(portions(counts, weights=weights), seed=seed, shuffle=True)
    stream = np.concatenate([mixture.order(number) for number in range(3)])
    sources, first = owner(counts)[stream], 0
    for source, count in enumerate(counts):
        mine = stream[sources == source]
        for start in range(0, len(mine) - count + 1, count):
            own = mine[start : start + count]
            assert sorted(own.tolist()) == list(range(first, first + count))
        first += count


@given(case=weighted(), seed=seeds, data=st.data())
def test_a_pass_is_as_long_as_the_stop_rule_says(case, seed, data):
    counts, weights = case
    epochs = data.draw(
        st.lists(st.sampled_from([1.0, 2.0, 2.5]), min_size=len(counts), max_size=len(counts))
    )
    made = portions(counts, weights=weights, epochs=epochs)
    ends = np.multiply(counts, epochs)
    every = mix(made, stop="all_exhausted", seed=seed, shuffle=True)
    assert np.all(np.array(every.counts(every.length)) >= ends)
    assert np.any(np.array(every.counts(every.length - 1)) < ends)
    assert set(every.order(0).tolist()) == set(range(sum(counts)))
    try:
        first = mix(made, stop="first_exhausted", seed=seed, shuffle=True)
    except DataError:
        return
    assert np.all(np.array(first.counts(first.length)) <= ends)
    assert np.any(np.array(first.counts(first.length + 1)) > ends)
    if max(epochs) == 1:
        assert len(set(first.order(0).tolist())) == first.length


@given(counts=sizes, data=st.data(), seed=seeds, shuffle=st.booleans())
def test_without_weights_a_pass_is_each_source_as_often_as_its_epochs(counts, data, seed, shuffle):
    epochs = data.draw(
        st.lists(st.sampled_from([0.25, 1.0, 1.5, 3.0]), min_size=len(counts), max_size=len(counts))
    )
    mixture = mix(portions(counts, epochs=epochs), seed=seed, shuffle=shuffle)
    wanted = [max(1, round(n * e)) for n, e in zip(counts, epochs, strict=True)]
    for number in range(3):
        order = mixture.order(number)
        assert np.bincount(owner(counts)[order], minlength=len(counts)).tolist() == wanted
    if not shuffle:
        assert owner(counts)[mixture.order(1)].tolist() == sorted(owner(counts)[mixture.order(1)])


def test_shares_of_documents_by_rows_and_by_tokens():
    lengths = [10] * 100 + [40] * 300
    made = portions([100, 300], weights=[3, 1], lengths=lengths)
    assert mix(made, seed=0, shuffle=True).shares() == [0.75, 0.25]
    # 3 : 1 in tokens are 3 / 10 : 1 / 40 in documents.
    by_tokens = mix(made, by="tokens", seed=0, shuffle=True)
    assert by_tokens.shares() == pytest.approx([12 / 13, 1 / 13])
    # The 300th document of the second source is due in the middle of its 13 places.
    assert by_tokens.length == 299 * 13 + 7
    assert by_tokens.counts(by_tokens.length) == [299 * 12 + 6, 300]
    # Once all of the second is 12,000 tokens, so 36,000 of the first: 36 passes.
    assert by_tokens.counts(300 * 13) == [3600, 300]
    first = mix(made, by="tokens", stop="first_exhausted", seed=0, shuffle=True)
    assert first.counts(first.length)[0] == 100
    assert first.counts(first.length)[1] in (8, 9)


@given(data=st.data(), case=weighted(), seed=seeds)
def test_tokens_are_shared_out_exactly_over_whole_passes_of_the_sources(data, case, seed):
    counts, weights = case
    total = sum(counts)
    lengths = data.draw(st.lists(st.integers(1, 99), min_size=total, max_size=total))
    made = portions(counts, weights=weights, lengths=lengths)
    shares = mix(made, by="tokens", seed=seed, shuffle=True).shares()
    tokens = [s * p.tokens / len(p.documents) for s, p in zip(shares, made, strict=True)]
    wanted = [weight / sum(weights) for weight in weights]
    assert [t / sum(tokens) for t in tokens] == pytest.approx(wanted, rel=1e-4)


@given(
    case=weighted(),
    seed=seeds,
    size=st.sampled_from([{"documents": 3}, {"tokens": 25}]),
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
def test_a_step_of_a_mixture_depends_on_its_number_alone(case, seed, size, steps):
    counts, weights = case
    lengths = [1 + n % 7 for n in range(sum(counts))]

    def order() -> BatchSampler:
        mixture = mix(portions(counts, weights=weights), seed=seed, shuffle=True)
        return BatchSampler(lengths, **size, seed=seed, shuffle=True, mixture=mixture)

    walked = order()
    stream = [walked.step_indices(step).tolist() for step in range(max(steps) + 1)]
    for step in steps:
        resumed = order()
        assert [resumed.step_indices(n).tolist() for n in range(step, max(steps) + 1)] == (
            stream[step:]
        )
        seen = np.bincount(np.concatenate(stream[: step + 1]), minlength=len(lengths))
        assert resumed.visits(step + 1).tolist() == seen.tolist()


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    size=st.sampled_from([{"documents": 4}, {"tokens": 60}]),
    steps=st.integers(0, 40),
)
def test_visits_without_a_mixture(lengths, size, steps):
    order = BatchSampler(lengths, **size, seed=5, shuffle=True)
    seen = [0] * len(lengths)
    for step in range(steps):
        for document in order.step_indices(step):
            seen[document] += 1
    assert order.visits(steps).tolist() == seen


def test_seeds_and_passes_change_the_documents_and_not_the_sources():
    counts = [50, 50]
    made = portions(counts, weights=[2, 1])
    one, other = (mix(made, seed=seed, shuffle=True) for seed in (1, 2))
    assert one.order(0).dtype == np.int32
    assert one.order(0).tolist() != other.order(0).tolist()
    assert owner(counts)[one.order(0)].tolist() == owner(counts)[other.order(0)].tolist()


def test_an_empty_source_and_one_below_a_document_a_pass_are_refused():
    with pytest.raises(DataError, match="it has no documents left") as caught:
        mix(portions([3, 0], weights=[1, 1]), seed=0, shuffle=True)
    assert caught.value.where == "s1"
    small = portions([5, 100], weights=[1000, 1])
    with pytest.raises(DataError, match="it has no place in a pass") as caught:
        mix(small, stop="first_exhausted", seed=0, shuffle=True)
    assert caught.value.where == "s1"
    with pytest.raises(DataError, match="documents"):
        mix(portions([1, 10**6], weights=[1e9, 1]), seed=0, shuffle=True)


def test_billions_of_places_are_counted_as_exactly_as_few():
    mixture = Mixture(portions([3, 4, 5]), [2**29, 2**28, 7], length=10, seed=0, shuffle=True)
    places = 5 * 10**9
    whole, rest = divmod(places, 2**29 + 2**28 + 7)
    few = mixture.counts(rest)
    assert mixture.counts(places) == [
        whole * weight + part for weight, part in zip([2**29, 2**28, 7], few, strict=True)
    ]
    number = places // 10
    step = np.bincount(owner([3, 4, 5])[mixture.order(number)], minlength=3)
    grown = np.subtract(mixture.counts(places + 10), mixture.counts(places))
    assert step.tolist() == grown.tolist()
