"""P4 and the policies for long rows, for every format: what is kept is whole, the rest counted."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from tunesmith.data.formats.detect import FORMATS
from tunesmith.data.preprocess.prepare import prepare
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.errors import DataError
from tunesmith.types import Document

TEMPLATE = wrap_tokenizer(tiny_tokenizer())
RAW = wrap_tokenizer(tiny_tokenizer(), template="none")
STOP = min(TEMPLATE.stop_ids)
WORDS = ["river", "42", "Oslo?", "é", "\n", "{}", "an answer", "I'll"]
TRAIN_ON = ["auto", "assistant", "last", "all"]


def words(made: random.Random, least: int = 1) -> str:
    return " ".join(made.choices(WORDS, k=made.randint(least, 9)))


def turns(made: random.Random) -> list[dict[str, Any]]:
    found = []
    for _ in range(made.randint(1, 3)):
        found += [{"role": "user", "content": words(made)}]
        found += [{"role": "assistant", "content": f"{words(made)}."}]
    return found


def row_of(format: str, made: random.Random) -> dict[str, Any]:
    if made.random() < 0.1:
        return {next(iter(FORMATS[format])): made.choice([None, 7, "", [], "text"])}
    chat = turns(made)
    if format == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        return {"conversations": [{"from": names[t["role"]], "value": t["content"]} for t in chat]}
    if format == "tokens":
        ids = [*made.choices(range(5, 300), k=made.randint(1, 50)), STOP]
        masks = {"loss_mask": [*made.choices([0, 1], k=len(ids) - 1), 1]}
        return {"input_ids": ids, **(masks if made.random() < 0.7 else {})}
    if format == "segments":
        parts = [{"text": f"{words(made)} ", "train": made.random() < 0.5} for _ in range(5)]
        return {"segments": [*parts, {"text": f"{words(made)}<|im_end|>", "train": True}]}
    return {
        "messages": {"messages": chat},
        "preference": {"chosen": chat, "rejected": [*chat[:-1], {**chat[-1], "content": "no"}]},
        "prompt_completion": {"prompt": words(made), "completion": words(made)},
        "alpaca": {"instruction": words(made), "input": "", "output": words(made)},
        "text": {"text": words(made)},
        "templated_text": {"text": TEMPLATE.render(chat)},
    }[format]


def prepared(rows: list[dict[str, Any]], format: str, template: Any, **options: Any) -> Any:
    """What is prepared, or None where nothing is left to learn from."""
    source = Source("made", rows=rows, format=format)
    try:
        return prepare([source], template, bad_rows="drop", **options)
    except DataError:
        return None


def check_columns(result: Any, rows: int) -> None:
    totals, documents = result.ledger.totals, result.documents
    result.ledger.check()
    assert totals.rows == rows
    assert totals.rows == totals.rows_trained + totals.rows_truncated + totals.rows_dropped
    assert totals.tokens == (
        totals.tokens_trained + totals.tokens_context + totals.tokens_truncated
        + totals.tokens_dropped + totals.tokens_unused
    )  # fmt: skip
    assert totals.rows_trained + totals.rows_truncated == len(documents)
    assert totals.tokens_trained == sum(one.target_tokens for one in documents)
    assert totals.tokens_trained + totals.tokens_context == sum(one.tokens for one in documents)


def learned_runs(document: Document) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each run of targets the ids on its path before it, and its own."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for segment in document.segments:
        above: list[int] = []
        parent = segment.parent
        while parent >= 0:
            above = document.segments[parent].ids.tolist() + above
            parent = document.segments[parent].parent
        ids, places = segment.ids.tolist(), segment.index.tolist()
        start = 0
        for at in range(1, len(places) + 1):
            if at == len(places) or places[at] != places[at - 1] + 1:
                begin, end = places[start], places[at - 1] + 1
                found.append((tuple(above + ids[:begin]), tuple(ids[begin:end])))
                start = at
    return found


cases = given(
    format=st.sampled_from(list(FORMATS)),
    train_on=st.sampled_from(TRAIN_ON),
    too_long=st.sampled_from(["drop", "truncate", "split"]),
    max_length=st.sampled_from([5, 12, 25, 40, 70]),
    raw=st.booleans(),
    seed=st.integers(0, 10**6),
)
thorough = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@thorough
@cases
def test_columns_add_up_for_every_format_and_policy(
    format: str, train_on: str, too_long: str, max_length: int, raw: bool, seed: int
) -> None:
    made = random.Random(seed)
    rows = [row_of(format, made) for _ in range(6)]
    options = {"train_on": train_on, "too_long": too_long, "max_length": max_length}
    result = prepared(rows, format, RAW if raw else TEMPLATE, **options)
    if result is None:
        return
    check_columns(result, len(rows))
    assert all(document.longest_path <= max_length for document in result.documents)


@thorough
@cases
def test_what_is_kept_of_a_long_row_is_whole(
    format: str, train_on: str, too_long: str, max_length: int, raw: bool, seed: int
) -> None:
    made = random.Random(seed)
    rows = [row_of(format, made) for _ in range(6)]
    template = RAW if raw else TEMPLATE
    free = prepared(rows, format, template, train_on=train_on, max_length=None)
    if free is None:
        return
    whole = {document.origin.row: document for document in free.documents}
    options = {"train_on": train_on, "too_long": too_long, "max_length": max_length}
    result = prepared(rows, format, template, **options)
    kept = {} if result is None else {one.origin.row: one for one in result.documents}
    for row, document in whole.items():
        fits = document.longest_path <= max_length
        assert row in kept or not fits
        if row not in kept:
            continue
        if fits:
            assert learned_runs(kept[row]) == learned_runs(document)
        elif is_stream(rows[row], format, train_on, raw=raw):
            check_stream(kept[row], document, too_long)
        else:
            assert too_long != "drop"
            check_answers(kept[row], document)


def is_stream(row: dict[str, Any], format: str, train_on: str, *, raw: bool) -> bool:
    """Whether a row is one run of tokens, that may be cut anywhere."""
    untagged = format == "tokens" and "loss_mask" not in row
    strings = raw and format in ("prompt_completion", "alpaca", "preference")
    return train_on == "all" or format == "text" or untagged or strings


def check_answers(kept: Document, whole: Document) -> None:
    """Each answer that is left is whole, after all that stood before it."""
    runs = learned_runs(whole)
    assert all(run in runs for run in learned_runs(kept))
    assert len(learned_runs(kept)) < len(runs)


def check_stream(kept: Document, whole: Document, too_long: str) -> None:
    """`truncate` keeps the beginning, `split` all of it, in pieces that are roots."""
    assert too_long != "drop"
    (everything,) = whole.segments
    ids = [token for segment in kept.segments for token in segment.ids.tolist()]
    assert all(segment.parent == -1 for segment in kept.segments)
    if too_long == "truncate":
        assert len(kept.segments) == 1
        assert ids == everything.ids[: len(ids)].tolist()
        return
    # Of a raw prompt whole pieces without a target are left out.
    assert ids == everything.ids[len(everything.ids) - len(ids) :].tolist()
    firsts = sum(len(segment.ids) < len(ids) for segment in kept.segments)
    assert kept.target_tokens >= everything.index.size - firsts


@pytest.mark.parametrize("format", FORMATS)
def test_over_long_rows_are_errors_unless_a_policy_is_chosen(format: str) -> None:
    made = random.Random(format)
    rows = [row_of(format, made) for _ in range(12)]
    free = prepared(rows, format, TEMPLATE, max_length=None)
    assert free is not None
    limit = max(document.longest_path for document in free.documents)
    assert prepared(rows, format, TEMPLATE, max_length=limit, too_long="error") is not None
    source = Source("made", rows=rows, format=format)
    with pytest.raises(DataError, match="too-long") as caught:
        prepare([source], TEMPLATE, bad_rows="drop", max_length=limit - 1, too_long="error")
    assert "data.too_long=" in (caught.value.hint or "")


@pytest.mark.parametrize("too_long", ["drop", "truncate", "split"])
def test_a_raw_answer_that_is_cut_is_left_out_or_goes_on(too_long: str) -> None:
    rows = [
        {"prompt": "river river", "completion": "an answer " * 9},
        {"prompt": "a", "completion": "b"},
    ]
    result = prepared(rows, "prompt_completion", RAW, max_length=9, too_long=too_long)
    found = {document.origin.row for document in result.documents}
    assert found == ({0, 1} if too_long == "split" else {1})
    if too_long == "split":
        last = result.documents[0].segments[-1]
        assert last.ids[-1] in RAW.stop_ids
        assert len(last.ids) - 1 in last.index
