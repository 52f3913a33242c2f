"""Every micro-batch goes to one rank, all ranks get as many, and nearly as much work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.microbatch.planner import plan_step
from tunesmith.distributed.load_balance import IDLE, assign, idle_fraction, loads
from tunesmith.train.microbatches import WorkModel, assigned_to, plan_for_ranks
from tunesmith.types import NO_MESSAGE, Document, Origin, Segment

WORK = st.lists(st.floats(0.0, 1e12), max_size=40)


@given(work=WORK, ranks=st.integers(1, 9))
def test_every_number_is_dealt_once(work: list[float], ranks: int) -> None:
    rounds = assign(work, ranks)
    assert all(len(dealt) == ranks for dealt in rounds)
    assert sorted(n for dealt in rounds for n in dealt if n != IDLE) == list(range(len(work)))
    assert len(rounds) == -(-len(work) // ranks)
    assert all(IDLE not in dealt for dealt in rounds[:-1])


@given(work=WORK, ranks=st.integers(1, 9))
def test_ranks_differ_by_no_more_than_the_largest(work: list[float], ranks: int) -> None:
    held = loads(assign(work, ranks), work)
    if held:
        assert max(held) - min(held) <= max(work) * (1 + 1e-9)


def test_alike_micro_batches_run_at_the_same_time() -> None:
    rounds = assign([5, 1, 4, 1, 5, 4], 2)
    assert [sorted(round_) for round_ in rounds] == [[0, 4], [2, 5], [1, 3]]


def test_the_idle_share_counts_who_waits() -> None:
    assert idle_fraction(assign([4.0], 4), [4.0]) == pytest.approx(0.75)
    assert idle_fraction(assign([4.0, 2.0], 2), [4.0, 2.0]) == pytest.approx(0.25)
    assert idle_fraction(assign([3.0] * 4, 2), [3.0] * 4) == 0


def document(ids: list[int], number: int) -> Document:
    place = np.arange(1, len(ids), dtype=np.int32)
    segment = Segment(
        np.asarray(ids, np.int32),
        -1,
        0,
        place,
        np.ones(len(place), np.float32),
        np.full(len(place), NO_MESSAGE, np.int32),
    )
    return Document((segment,), Origin("rows", number))


DOCUMENTS = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=12), min_size=1, max_size=12)


def shares(plans) -> dict[tuple[int, int], float]:
    """Weight by document and target id."""
    found: dict[tuple[int, int], float] = {}
    for plan in plans:
        targets = plan.target[plan.owners.target].tolist()
        for number, target, weight in zip(
            plan.owners.document.tolist(), targets, plan.owners.weight.tolist(), strict=True
        ):
            found[number, target] = found.get((number, target), 0.0) + weight
    return found


@settings(deadline=None)
@given(
    ids=DOCUMENTS,
    ranks=st.integers(1, 6),
    micro_tokens=st.integers(1, 60),
    share_prefixes=st.booleans(),
    unpacked=st.booleans(),
)
def test_every_target_is_learned_on_one_rank(
    ids, ranks, micro_tokens, share_prefixes, unpacked
) -> None:
    documents = [document(row, number) for number, row in enumerate(ids)]
    work_model = WorkModel(token=100.0, pair=1.0, target=10.0)
    options = {"micro_tokens": micro_tokens, "share_prefixes": share_prefixes, "unpacked": unpacked}
    plans = plan_for_ranks(documents, ranks, work_model=work_model, **options)
    parts = [assigned_to(plans, rank, ranks=ranks, work_model=work_model) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert all(part for part in parts)
    found = shares([plan for part in parts for plan in part])
    assert found == shares(plan_step(documents, **options))
    total = sum(float(plan.weight.sum()) for part in parts for plan in part)
    assert total == pytest.approx(sum(len(row) - 1 for row in ids))
    limit = max(micro_tokens, max(len(row) - 1 for row in ids))
    assert all(plan.tokens <= limit for plan in plans)


def test_a_step_is_cut_finer_to_fill_the_ranks() -> None:
    documents = [document([number, *range(10, 19)], number) for number in range(8)]
    plans = plan_for_ranks(documents, 4, work_model=WorkModel(), micro_tokens=1000)
    assert [plan.tokens for plan in plans] == [18, 18, 18, 18]
    assert len(plan_step(documents, micro_tokens=1000)) == 1


def test_the_square_of_attention_counts() -> None:
    long, short = document(list(range(41)), 0), document([50, 51, 52], 1)
    work_model = WorkModel(token=1.0, pair=1.0)
    plans = plan_step([long, short], micro_tokens=40)
    assert [work_model.of(plan) for plan in plans] == [40 + 40 * 41 / 2, 2 + 3]


def test_a_rank_without_work_runs_the_smallest_without_weight() -> None:
    documents = [document([1, 2, 3, 4], 0), document([5, 6], 1)]
    work_model = WorkModel()
    plans = plan_step(documents, micro_tokens=3)
    assert len(plans) == 2
    filler = assigned_to(plans, 2, ranks=3, work_model=work_model)[0]
    assert filler.tokens == min(plan.tokens for plan in plans)
    assert filler.weight.sum() == 0
    assert len(filler.owners.weight) == 0
