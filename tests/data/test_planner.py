"""Micro-batches of a step against an oracle that only knows paths: what each target sees, and how
often it is there.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.types import Document, Origin, Segment


def make_segment(ids, parent, start, index, weight=1.0) -> Segment:
    index = np.array(sorted(index), np.int32)
    return Segment(
        np.array(ids, np.int32), parent, start, index,
        np.full(len(index), weight, np.float32), np.zeros(len(index), np.int32),
    )  # fmt: skip


@st.composite
def trees(draw) -> Document:
    """Documents over a tiny alphabet, so that prefixes meet in every way; up to five segments."""
    segments: list[Segment] = []
    for number in range(draw(st.integers(1, 5))):
        parent = draw(st.integers(-1, number - 1))
        ids = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        start = 0 if parent < 0 else segments[parent].start + len(segments[parent].ids)
        places = list(range(1 if parent < 0 else 0, len(ids)))
        index = draw(st.lists(st.sampled_from(places), unique=True)) if places else []
        weight = draw(st.sampled_from([0.5, 1.0]))
        segments.append(make_segment(ids, parent, start, index, weight))
    return Document(tuple(segments), Origin("made", 0))


def expected(documents: list[Document]) -> Counter:
    """(document, ids before the target, target) -> weight."""
    result: Counter = Counter()
    for number, document in enumerate(documents):
        paths: list[tuple[int, ...]] = []
        for segment in document.segments:
            above = paths[segment.parent] if segment.parent >= 0 else ()
            path = above + tuple(int(i) for i in segment.ids)
            paths.append(path)
            for place, weight in zip(segment.index, segment.weight, strict=True):
                at = segment.start + int(place)
                result[number, path[:at], path[at]] += float(weight)
    return result


def seen_by(plan: MicrobatchPlan, token: int) -> list[int]:
    """Packed tokens that `token` sees, by the rule of `visible_until`."""
    until = plan.layout.visible_until
    return [k for k in range(token + 1) if token < until[k]]


def found(plans: list[MicrobatchPlan]) -> Counter:
    result: Counter = Counter()
    for plan in plans:
        owners = plan.owners
        for target, document, weight in zip(
            owners.target, owners.document, owners.weight, strict=True
        ):
            before = tuple(int(plan.ids[k]) for k in seen_by(plan, int(plan.source[target])))
            result[int(document), before, int(plan.target[target])] += float(weight)
    return result


LAYOUTS = st.fixed_dictionaries(
    {
        "micro_tokens": st.sampled_from([1, 5, 12, 1000]),
        "share_prefixes": st.booleans(),
        "unpacked": st.booleans(),
    }
)
ROWS = st.lists(trees(), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(ROWS, LAYOUTS)
def test_every_target_is_there_once_and_sees_exactly_its_path(documents, layout) -> None:
    plans = plan_step(documents, **layout)
    assert found(plans) == expected(documents)
    for plan in plans:
        owners = plan.owners
        summed = np.bincount(owners.target, weights=owners.weight, minlength=len(plan.weight))
        np.testing.assert_allclose(summed, plan.weight)
        pairs = list(zip(plan.source, plan.target, strict=True))
        assert len(pairs) == len(set(pairs))


@settings(max_examples=300, deadline=None)
@given(ROWS, LAYOUTS)
def test_chains_say_the_same_as_visible_until(documents, layout) -> None:
    for plan in plan_step(documents, **layout):
        covered = 0
        for chain in plan.layout.chains:
            assert chain.start == covered
            covered = chain.end
            above = [k for start, end in chain.prefix for k in range(start, end)]
            for token in range(chain.start, chain.end):
                assert seen_by(plan, token) == [*above, *range(chain.start, token + 1)]
                assert plan.layout.position[token] == len(above) + token - chain.start
        assert covered == len(plan.ids)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from([5, 12]), st.booleans())
def test_micro_batches_keep_to_the_bound_or_to_the_longest_path(
    documents, bound, share_prefixes
) -> None:
    plans = plan_step(documents, micro_tokens=bound, share_prefixes=share_prefixes)
    longest = max((int(plan.layout.position.max()) + 1 for plan in plans), default=0)
    assert all(plan.tokens <= max(bound, longest) for plan in plans)


def rows_with_a_system_prompt(count: int, shared: int = 100) -> list[Document]:
    system = list(range(3, 3 + shared))
    return [
        Document((make_segment([*system, 500 + i, 700 + i], -1, 0, [shared + 1]),), Origin("m", i))
        for i in range(count)
    ]


def test_a_shared_prefix_is_computed_once_a_micro_batch() -> None:
    documents = rows_with_a_system_prompt(8)
    (whole,) = plan_step(documents, micro_tokens=1000)
    assert whole.tokens == 100 + 8
    cut = plan_step(documents, micro_tokens=104)
    assert [plan.tokens for plan in cut] == [104, 104]
    unshared = plan_step(documents, micro_tokens=1000, share_prefixes=False)
    assert sum(plan.tokens for plan in unshared) == 8 * 101


def test_the_last_token_of_an_answer_is_not_computed() -> None:
    document = Document((make_segment([5, 6, 7, 8], -1, 0, [2, 3]),), Origin("made", 0))
    (plan,) = plan_step([document], micro_tokens=100)
    assert plan.ids.tolist() == [5, 6, 7]
    assert plan.target.tolist() == [7, 8]


def test_the_longest_chain_of_a_chat_is_one_causal_run() -> None:
    trunk = make_segment(range(10), -1, 0, [9])
    short = make_segment(range(50, 54), 0, 10, [3])
    long = make_segment(range(20, 40), 0, 10, [19])
    document = Document((trunk, short, long), Origin("made", 0))
    (plan,) = plan_step([document], micro_tokens=1000)
    first, second = plan.layout.chains
    assert (first.start, first.end, first.prefix) == (0, 29, ())
    assert second.prefix == ((0, 10),)


def test_micro_batches_are_few_and_balanced() -> None:
    rng = np.random.default_rng(0)
    documents = [
        Document((make_segment(rng.integers(3, 10**6, n), -1, 0, [n - 1]),), Origin("made", i))
        for i, n in enumerate(rng.integers(50, 300, 64))
    ]
    tokens = sum(document.tokens - 1 for document in documents)
    sizes = [plan.tokens for plan in plan_step(documents, micro_tokens=2048)]
    assert len(sizes) <= -(-tokens // 2048) + 1
    assert max(sizes) - min(sizes) < 0.03 * max(sizes)


def test_documents_without_targets_cost_nothing() -> None:
    nothing = Document((make_segment([1, 2], -1, 0, []),), Origin("made", 0))
    assert plan_step([nothing], micro_tokens=9) == []


def test_a_very_long_chat_needs_no_recursion() -> None:
    turns = 3000
    segments = [make_segment([1, 2, 3], -1, 0, [2])]
    for number in range(turns):
        segments.append(make_segment([4, 5 + number % 7], number, 3 + 2 * number, [1]))
    plans = plan_step([Document(tuple(segments), Origin("made", 0))], micro_tokens=100)
    assert sum(len(plan.target) for plan in plans) == turns + 1


def fewest_tokens(paths: list[tuple[int, ...]], bound: int) -> int:
    """Tokens computed by the best of all ways to put paths into micro-batches."""
    prefixes = [{path[:end] for end in range(1, len(path) + 1)} for path in paths]
    every = (1 << len(paths)) - 1
    cost = [0] * (every + 1)
    for chosen in range(1, every + 1):
        held = (prefixes[at] for at in range(len(paths)) if chosen >> at & 1)
        cost[chosen] = len(set().union(*held))
    best = [0] + [10**9] * every
    for chosen in range(1, every + 1):
        first = chosen & -chosen
        others = rest = chosen ^ first
        while True:
            if cost[others | first] <= bound:
                whole = best[rest ^ others] + cost[others | first]
                best[chosen] = min(best[chosen], whole)
            if not others:
                break
            others = (others - 1) & rest
    return best[every]


@st.composite
def bushes(draw) -> list[tuple[int, ...]]:
    """Two to seven paths that leave a few stems, each with an end of its own."""
    fresh = iter(range(1, 10**6))

    def grown(above: tuple[int, ...], most: int) -> tuple[int, ...]:
        return above + tuple(next(fresh) for _ in range(draw(st.integers(1, most))))

    stems: list[tuple[int, ...]] = [()]
    for _ in range(draw(st.integers(1, 4))):
        stems.append(grown(draw(st.sampled_from(stems)), 12))
    return [grown(draw(st.sampled_from(stems)), 14) for _ in range(draw(st.integers(2, 7)))]


def computed_tokens(paths: list[tuple[int, ...]], bound: int) -> int:
    documents = [
        Document((make_segment([*path, 9], -1, 0, [len(path)]),), Origin("made", n))
        for n, path in enumerate(paths)
    ]
    return sum(plan.tokens for plan in plan_step(documents, micro_tokens=bound))


@settings(max_examples=150, deadline=None)
@given(bushes(), st.floats(1.0, 3.0))
def test_a_cut_loses_little_more_than_the_best_of_all_cuts(paths, room) -> None:
    bound = int(max(map(len, paths)) * room)
    best = fewest_tokens(paths, bound)
    assert best <= computed_tokens(paths, bound) <= 1.34 * best


def test_nearly_every_cut_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    ratios: list[float] = []
    for _ in range(150):
        fresh = iter(range(1, 10**6))
        stems: list[tuple[int, ...]] = [()]
        for _ in range(int(rng.integers(1, 5))):
            above = stems[int(rng.integers(len(stems)))]
            stems.append(above + tuple(next(fresh) for _ in range(int(rng.integers(1, 12)))))
        paths = [
            stems[int(rng.integers(len(stems)))]
            + tuple(next(fresh) for _ in range(int(rng.integers(1, 15))))
            for _ in range(int(rng.integers(2, 8)))
        ]
        bound = int(max(map(len, paths)) * rng.uniform(1, 3))
        ratios.append(computed_tokens(paths, bound) / fewest_tokens(paths, bound))
    assert np.mean(ratios) < 1.01
    assert np.mean(np.array(ratios) == 1) > 0.95
