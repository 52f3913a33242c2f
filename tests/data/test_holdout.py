import random

import pytest

from tunesmith.data.preprocess.holdout import holdout_split, row_digest
from tunesmith.errors import DataError

ROWS = [{"text": f"row {n}"} for n in range(200)]


def held(rows, choice):
    return {row["text"] for row in rows if choice.holds(row)}


@pytest.mark.parametrize(("asked", "rows"), [({"share": 0.02}, 4), ({"count": 30}, 30)])
def test_as_many_rows_as_asked_whatever_their_order(asked, rows):
    choice = holdout_split(ROWS, **asked)
    assert choice.rows == rows == len(held(ROWS, choice))
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert held(ROWS, holdout_split(shuffled, **asked)) == held(ROWS, choice)


def test_duplicates_go_along():
    smallest = min(ROWS, key=row_digest)
    choice = holdout_split([*ROWS, smallest, smallest], count=1)
    assert choice.rows == 3
    assert held(ROWS, choice) == {smallest["text"]}


def test_other_columns_and_key_order_do_not_make_another_row():
    one = {"id": 1, "prompt": "p", "completion": "c"}
    assert row_digest(one) == row_digest({"completion": "c", "prompt": "p", "id": 2, "text": None})
    assert row_digest(one) != row_digest({**one, "completion": "d"})


def test_a_small_share_holds_out_one_row():
    assert holdout_split(ROWS[:10], share=0.02).rows == 1


@pytest.mark.parametrize("asked", [{"share": 1.0}, {"count": 200}, {"count": 999}])
def test_something_must_be_left(asked):
    with pytest.raises(DataError, match="leaves none"):
        holdout_split(ROWS, **asked)
