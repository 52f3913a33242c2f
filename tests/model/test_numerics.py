"""The measure of numerical equivalence and its bounds."""

from __future__ import annotations

import math

import pytest
import torch

from tunesmith.model.ops.numerics import (
    NARROW,
    ONE_OPERATION,
    Comparison,
    equivalence_trial,
    relative_difference,
    whole_model_bound,
)

CPU = torch.device("cpu")


def test_over_all_values_by_rows_and_robust() -> None:
    wanted = torch.tensor([[3.0, 4.0], [0.0, 10.0], [0.0, 1.0]])
    found = wanted + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 1.0]])
    whole = math.sqrt(0.25 + 1.0) / math.sqrt(25 + 100 + 1)
    assert relative_difference(found, wanted) == pytest.approx(whole)
    assert relative_difference(found, wanted, rows=True) == pytest.approx(1.0)
    assert relative_difference(found, wanted, robust=True) == pytest.approx(0.1)


def test_what_is_no_number_differs_without_end() -> None:
    wanted = torch.ones(2, 3)
    found = wanted.clone()
    found[0, 0] = float("nan")
    assert relative_difference(found, wanted) == math.inf
    assert relative_difference(found, wanted, rows=True) == math.inf


def test_zero_equals_zero() -> None:
    assert relative_difference(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_difference(torch.full((3,), 1e-3), torch.zeros(3)) > 1.0


def test_bounds_leave_room_for_one_rounding_and_not_for_a_wrong_value() -> None:
    """Rounding to a dtype once stays below its bound; a tenth more does not."""
    values = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for dtype, bound in ONE_OPERATION.items():
        rounded = values.to(dtype).float()
        assert relative_difference(rounded, values) < bound
        assert relative_difference(1.1 * rounded, values) > bound
    assert whole_model_bound(torch.float32, CPU) < whole_model_bound(
        torch.float32, torch.device("meta")
    )
    assert all(whole_model_bound(dtype, CPU) < 0.1 for dtype in NARROW)


def test_a_trial_holds_each_result_to_its_bound() -> None:
    ones = torch.ones(2, 3)
    near = Comparison(1.001 * ones, ones, 1e-2)
    far = Comparison(1.5 * ones, ones, 1e-2, rows=True)
    assert equivalence_trial(lambda: [near]).problem is None
    verdict = equivalence_trial(lambda: [near, far])
    assert verdict.excesses == pytest.approx((0.1, 50.0), rel=1e-3)
    assert verdict.problem == "it differs by 5.0e+01 times what rounding explains"


def test_a_trial_of_other_shapes_or_no_numbers_does_not_pass() -> None:
    ones = torch.ones(2, 3)
    for found in (torch.ones(3, 2), ones * math.nan):
        assert equivalence_trial(lambda found=found: [Comparison(found, ones, 1.0)]).excess == (
            math.inf
        )


def test_a_trial_that_can_not_be_run_says_why() -> None:
    def failing() -> list[Comparison]:
        raise RuntimeError("no compiler\nand more")

    verdict = equivalence_trial(failing)
    assert verdict.problem == "no compiler"
    assert verdict.excess == math.inf
    with pytest.raises(RuntimeError):
        equivalence_trial(failing, catch=(ValueError,))
