import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.loader import StepOrder

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)
sizes = st.one_of(
    st.fixed_dictionaries({"documents": st.integers(1, 12)}),
    st.fixed_dictionaries({"tokens": st.integers(1, 120)}),
)


@given(lengths=lengths, size=sizes, seed=st.integers(0, 2**32 - 1), shuffle=st.booleans())
def test_every_document_once_an_epoch(lengths, size, seed, shuffle):
    order = StepOrder(lengths, **size, seed=seed, shuffle=shuffle)
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


@given(lengths=lengths, tokens=st.integers(1, 120), seed=st.integers(0, 99))
def test_a_step_stops_as_soon_as_it_has_its_tokens(lengths, tokens, seed):
    order = StepOrder(lengths, tokens=tokens, seed=seed, shuffle=True)
    for step in range(order.steps_per_epoch):
        sizes = [lengths[n] for n in order.step_indices(step)]
        assert sum(sizes[:-1]) < tokens
        assert sum(sizes) >= tokens or step == order.steps_per_epoch - 1


@given(lengths=lengths, size=sizes, steps=st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_a_step_depends_on_its_number_alone(lengths, size, steps):
    walked = StepOrder(lengths, **size, seed=7, shuffle=True)
    in_order = [walked.step_indices(step).tolist() for step in range(max(steps) + 1)]
    asked = StepOrder(lengths, **size, seed=7, shuffle=True)
    for step in steps:
        assert asked.step_indices(step).tolist() == in_order[step]


def test_orders_differ_by_epoch_and_seed_and_are_int32():
    order = StepOrder([1] * 50, documents=50, seed=1, shuffle=True)
    other = StepOrder([1] * 50, documents=50, seed=2, shuffle=True)
    assert order.step_indices(0).dtype == np.int32
    assert order.step_indices(0).tolist() != order.step_indices(1).tolist()
    assert order.step_indices(0).tolist() != other.step_indices(0).tolist()


def test_without_shuffling_the_order_is_the_data_s():
    order = StepOrder([1] * 5, documents=2, seed=1, shuffle=False)
    steps = [order.step_indices(step).tolist() for step in range(6)]
    assert steps == [[0, 1], [2, 3], [4]] * 2


@pytest.mark.parametrize(("epochs", "steps"), [(0.01, 1), (0.1, 1), (0.5, 5), (1, 10), (2.25, 23)])
def test_shares_of_an_epoch_round_up_to_whole_steps(epochs, steps):
    assert StepOrder([3] * 100, documents=10, seed=0, shuffle=True).total_steps(epochs) == steps
    assert StepOrder([3] * 100, tokens=30, seed=0, shuffle=True).total_steps(epochs) == steps


@pytest.mark.parametrize("size", [{}, {"documents": 1, "tokens": 1}, {"documents": 0}])
def test_one_size_is_needed(size):
    with pytest.raises(ValueError, match="step"):
        StepOrder([1], **size, seed=0, shuffle=False)


def test_the_order_of_a_seed_never_changes():
    order = StepOrder([1] * 8, documents=8, seed=42, shuffle=True)
    for epoch in range(3):
        wanted = np.random.Generator(np.random.PCG64((42, epoch))).permutation(8)
        assert order.step_indices(epoch).tolist() == wanted.tolist()
    assert order.step_indices(0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
