from __future__ import annotations

import math

import pytest

from tunesmith.optim import auto_lr, schedule, warmup_steps
from tunesmith.optim.schedules import SHAPES

FORMULAS = {
    "cosine": lambda s: 0.5 * (1 + math.cos(math.pi * s / 100)),
    "linear": lambda s: 1 - s / 100,
    "constant": lambda s: 1.0,
    "exponential": lambda s: math.exp(-math.log(10) * s / 100),
    "quarter_cosine": lambda s: math.cos(math.pi * s / 200),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_closed_form_without_warmup(name):
    rate = schedule(name, lr=3e-4, warmup_steps=0, total_steps=100)
    for step in range(101):
        assert rate(step) == pytest.approx(3e-4 * FORMULAS[name](step), rel=1e-12, abs=1e-18)
    assert rate(500) == rate(100)


@pytest.mark.parametrize("name", SHAPES)
def test_warmup_rises_to_a_single_peak(name):
    rate = schedule(name, lr=1.0, warmup_steps=4, total_steps=20)
    assert [rate(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    rest = [rate(step) for step in range(4, 20)]
    assert rest == sorted(rest, reverse=True)
    assert all(0 < value <= 1 for value in rest)


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_short_runs_always_learn(name, total):
    for warmup in range(total + 2):
        rate = schedule(name, lr=1.0, warmup_steps=warmup, total_steps=total)
        assert all(rate(step) > 0 for step in range(total))


def test_warmup_is_a_share_or_a_count():
    assert warmup_steps(0, 100) == 0
    assert warmup_steps(0.03, 100) == 3
    assert warmup_steps(0.03, 10) == 1
    assert warmup_steps(0.07, 100) == 7
    assert warmup_steps(25, 100) == 25
    assert warmup_steps(1, 100) == 1


def test_auto_lr_by_adapter_and_size():
    assert auto_lr("lora", 70_000_000_000) == 2e-4
    assert auto_lr("none", 135_000_000) == 1e-4
    assert auto_lr("none", 500_000_000) == 5e-5
    assert auto_lr("none", 3_000_000_000) == 2e-5


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("least", [0.1, 1.0])
def test_min_lr_is_what_a_shape_of_zero_stands_for(name, least):
    rate = schedule(name, lr=3e-4, warmup_steps=0, total_steps=100, min_lr=least)
    for step in range(101):
        wanted = 3e-4 * (least + (1 - least) * FORMULAS[name](step))
        assert rate(step) == pytest.approx(wanted, rel=1e-12)


def test_wsd_warms_up_stays_and_falls_in_a_line():
    options = {"lr": 1.0, "warmup_steps": 10, "total_steps": 110, "decay": 0.3}
    rate = schedule("wsd", **options)
    assert rate(0) == pytest.approx(1 / 11)
    assert {rate(step) for step in range(10, 81)} == {1.0}
    for step in range(80, 111):
        assert rate(step) == pytest.approx((110 - step) / 30, abs=1e-12)
    floor = schedule("wsd", **options, min_lr=0.2)
    assert floor(95) == pytest.approx(0.2 + 0.8 * 0.5)
    assert floor(110) == floor(900) == pytest.approx(0.2)
