"""Durations, numbers, shares and column mappings: what is read, refused and written back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config.sections.data import parse_eval
from tunesmith.config.values import (
    Duration,
    Holdout,
    parse_columns,
    parse_duration,
    parse_holdout,
    parse_number,
)


@pytest.mark.parametrize(
    ("written", "value", "unit"),
    [
        (200, 200, "steps"),
        ("200", 200, "steps"),
        ("200 steps", 200, "steps"),
        ("0.25 epoch", 0.25, "epochs"),
        ("2epochs", 2, "epochs"),
        ("10 min", 10, "minutes"),
        ("1.5 minutes", 1.5, "minutes"),
    ],
)
def test_duration_reads(written: object, value: float, unit: str) -> None:
    assert parse_duration(written) == Duration(value, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["", "epoch", "0", "-3", "1.5", "3 days", True, "0 min", [3]])
def test_duration_refuses(written: object) -> None:
    with pytest.raises(ValueError, match=r"steps|zero"):
        parse_duration(written)


@given(
    st.sampled_from(["epochs", "minutes"]),
    st.floats(1e-4, 1e6, allow_nan=False, allow_infinity=False),
)
def test_duration_text_reads_back_exactly(unit: str, value: float) -> None:
    duration = Duration(value, unit)  # type: ignore[arg-type]
    assert parse_duration(duration.plain()) == duration


def test_long_step_counts_are_not_rounded() -> None:
    assert parse_duration(12345678).plain() == 12345678


def test_number_reads_what_yaml_leaves_as_text() -> None:
    assert parse_number("2e-5") == 2e-5
    assert parse_number(3) == 3


@pytest.mark.parametrize("written", ["fast", "", True, False])
def test_number_refuses(written: object) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_number(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("2%", Holdout(share=0.02)), (200, Holdout(rows=200)), ("200", Holdout(rows=200))],
)
def test_holdout_reads_and_writes_back(written: object, expected: Holdout) -> None:
    holdout = parse_holdout(written)
    assert holdout == expected
    assert parse_holdout(expected.plain()) == expected


@given(st.floats(0.01, 99.9))
def test_holdout_share_survives_writing(percent: float) -> None:
    holdout = parse_holdout(f"{percent!r}%")
    assert holdout is not None
    assert holdout.share is not None
    again = parse_holdout(holdout.plain())
    assert again is not None
    assert again.share == pytest.approx(holdout.share, rel=1e-9)


@pytest.mark.parametrize("written", ["0%", "100%", 0, 0.02, -3, 1.5])
def test_holdout_refuses(written: object) -> None:
    with pytest.raises(ValueError, match=r"0%|number of rows"):
        parse_holdout(written)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("dev.jsonl", {"eval": [{"path": "dev.jsonl"}]}),
        (["a", {"path": "b", "limit": 3}], {"eval": [{"path": "a"}, {"path": "b", "limit": 3}]}),
        ({"path": "a", "limit": 3}, {"eval": [{"path": "a", "limit": 3}]}),
        ({"maths": "a", "chat": ["b"]}, {"maths": [{"path": "a"}], "chat": [{"path": "b"}]}),
        ({"path": ["a"]}, {"path": [{"path": "a"}]}),
        (None, None),
    ],
)
def test_eval_names_its_sets(written: object, expected: object) -> None:
    assert parse_eval(written) == expected


@pytest.mark.parametrize(
    "written",
    [
        "prompt: question, completion: answer",
        "prompt=question,completion=answer",
        "prompt:question,completion:answer",
        "{prompt: question, completion: answer}",
    ],
)
def test_columns_read_command_line_forms(written: str) -> None:
    assert parse_columns(written) == {"prompt": "question", "completion": "answer"}


def test_columns_refuse_a_lone_word() -> None:
    with pytest.raises(ValueError, match="mapping"):
        parse_columns("question")
