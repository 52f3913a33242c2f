"""P4: every row and token of the input is in the ledger, whatever the rows and the policies are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from tunesmith.data.preprocess.prepare import prepare
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.errors import DataError

TEMPLATE = wrap_tokenizer(tiny_tokenizer())
RAW = wrap_tokenizer(tiny_tokenizer(), template="none")

words = st.lists(
    st.sampled_from(["river", "42", "Oslo?", "é", "<|im_end|>", "\n", "{}"]), max_size=9
).map(" ".join)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", "assistant", "system"])},
    optional={
        "content": st.one_of(words, st.none(), st.just(7)),
        "train": st.booleans(),
        "weight": st.sampled_from([0, 0.5, 2, -1]),
    },
)
chat = st.fixed_dictionaries({"messages": st.lists(message, max_size=6)})
pair = st.fixed_dictionaries({"prompt": words, "completion": words})
text = st.fixed_dictionaries({"text": words})
stranger = st.sampled_from([{}, {"messages": "no list"}, {"text": 3}, {"question": "?"}])


def rows_of(good: Any) -> Any:
    return st.lists(st.one_of(good, good, good, stranger), min_size=1, max_size=8)


rows = st.one_of(rows_of(chat), rows_of(pair), rows_of(text))
policies = st.fixed_dictionaries(
    {
        "too_long": st.sampled_from(["drop", "truncate", "split"]),
        "train_on": st.sampled_from(["auto", "assistant", "last", "all", ["user", "assistant"]]),
        "max_length": st.sampled_from([None, 2, 9, 25, 60]),
    }
)
templates = st.sampled_from([TEMPLATE, RAW])


@settings(max_examples=200, deadline=None)
@given(rows=rows, options=policies, template=templates, held_out=st.integers(0, 3))
def test_columns_add_up_and_are_the_documents(
    rows: list[dict[str, Any]], options: dict[str, Any], template: Any, held_out: int
) -> None:
    source = Source(name="made", rows=rows)
    number = iter(range(len(rows)))

    def keep(values: Any) -> bool:
        return held_out == 0 or next(number) % 4 != held_out

    try:
        prepared = prepare([source], template, bad_rows="drop", keep=keep, **options)
    except DataError:
        return  # nothing left to learn from
    totals, documents = prepared.ledger.totals, prepared.documents
    assert totals.rows == len(rows)
    assert totals.rows == (
        totals.rows_trained + totals.rows_truncated + totals.rows_dropped + totals.rows_held_out
    )
    assert totals.tokens == (
        totals.tokens_trained + totals.tokens_context + totals.tokens_truncated
        + totals.tokens_dropped + totals.tokens_unused
    )  # fmt: skip
    assert totals.rows_trained + totals.rows_truncated == len(documents)
    assert totals.tokens_trained == sum(document.target_tokens for document in documents)
    assert totals.tokens_trained + totals.tokens_context == sum(d.tokens for d in documents)
    limit = options["max_length"]
    assert limit is None or all(document.longest_path <= limit for document in documents)
    trained = {document.origin.row for document in documents}
    assert len(trained) == len(documents)
    reasons = prepared.ledger.reasons.get("made", {})
    accounted = [row for entry in reasons.values() for row in entry.rows]
    assert trained | set(accounted) == set(range(len(rows)))
    assert len(set(accounted) - trained) == totals.rows_dropped + totals.rows_held_out
    assert len(prepared.faults) <= totals.rows_dropped


@settings(max_examples=60, deadline=None)
@given(rows=rows, options=policies, template=templates)
def test_the_error_policy_refuses_exactly_what_drop_drops_as_bad(
    rows: list[dict[str, Any]], options: dict[str, Any], template: Any
) -> None:
    source = Source(name="made", rows=rows)
    try:
        dropped = prepare([source], template, bad_rows="drop", **options)
    except DataError:
        with pytest.raises(DataError):
            prepare([source], template, bad_rows="error", **options)
        return
    if dropped.faults:
        with pytest.raises(DataError, match=f"{len(dropped.faults)} of {len(rows)} rows"):
            prepare([source], template, bad_rows="error", **options)
    else:
        strict = prepare([source], template, bad_rows="error", **options)
        assert strict.ledger.to_dict() == dropped.ledger.to_dict()


@settings(max_examples=60, deadline=None)
@given(rows=rows, template=templates)
def test_over_long_rows_are_refused_unless_a_policy_is_chosen(
    rows: list[dict[str, Any]], template: Any
) -> None:
    source = Source(name="made", rows=rows)

    def run(**options: Any) -> Any:
        try:
            return prepare([source], template, bad_rows="drop", **options)
        except DataError as error:
            return error

    free = run(max_length=None)
    if isinstance(free, DataError):
        return
    longer = sum(document.longest_path > 30 for document in free.documents)
    strict = run(max_length=30, too_long="error")
    if longer:
        assert isinstance(strict, DataError)
        assert f"{longer} too-long" in str(strict)
    else:
        assert strict.ledger.to_dict() == free.ledger.to_dict()
