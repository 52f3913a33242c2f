from __future__ import annotations

import time

import pytest

from tunesmith.config.values import parse_duration
from tunesmith.train.triggers import Trigger


def epoch_after(step: int) -> float:
    return (step + 1) / 10


@pytest.mark.parametrize(
    ("every", "wanted"),
    [
        (None, []),
        (4, [4, 8, 12]),
        ("1 epoch", [10]),
        ("0.5 epoch", [5, 10]),
        ("0.1 epoch", list(range(1, 13))),
        ("0.3 epoch", [3, 6, 9, 12]),
    ],
)
def test_steps_and_epochs(every: object, wanted: list[int]) -> None:
    due = Trigger(parse_duration(every), epoch_after)
    assert [step for step in range(1, 13) if due.due(step)] == wanted


def test_minutes_are_counted_from_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    due = Trigger(parse_duration("10 min"), epoch_after, clock=lambda: now[0])
    found = []
    for step in range(1, 8):
        now[0] += 250.0
        monkeypatch.setattr(time, "time", lambda: -1e9 * now[0])  # the time of day is not asked
        if due.due(step):
            found.append(step)
    assert found == [3, 6]
