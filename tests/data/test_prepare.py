"""Reading and rendering as one, with a renderer of words and with a real template."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

import tunesmith.data.preprocess.render_batch as module
from tiny import chat_rows, tiny_tokenizer
from tunesmith.data.formats.examples import Chat, Completion
from tunesmith.data.preprocess.holdout import holdout_split
from tunesmith.data.preprocess.prepare import TOO_LONG, UNUSED, iter_prepared, prepare
from tunesmith.data.row_errors import Fault, RowError
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.errors import DataError
from tunesmith.types import Document, Segment


@dataclass
class Words:
    """Stands for a Rendered: the fields that `prepare` reads."""

    document: Document | None
    status: str
    reason: str | None
    tokens: int
    unused: int = 0
    fields: tuple = ()


class FakeTemplate:
    has_chat_template = True
    tokenizer = None

    def encode(self, texts, *, add_special_tokens=False):
        return [[] for _ in texts]

    def decode(self, ids):
        return " ".join(f"w{token}" for token in ids)


def render_words(example, template, *, train_on, max_length, too_long, origin):
    if isinstance(example, Chat):
        text = " ".join(message.content or "" for message in example.messages)
    else:
        text = example.completion if isinstance(example, Completion) else example.text
    words = text.split()
    if "forbidden" in words:
        raise RowError(Fault("special-token", "`forbidden` is a special token"))
    if max_length is None or len(words) <= max_length:
        return Words(document(len(words), origin), "trained", None, len(words))
    if too_long == "error":
        raise RowError(Fault(TOO_LONG, f"{len(words)} tokens, {max_length} allowed"))
    if too_long == "drop":
        return Words(None, "dropped", "over max_length", len(words))
    cut = document(max_length, origin)
    return Words(cut, "truncated", "over max_length", len(words) + 1, unused=1)


def document(length, origin):
    index = np.arange(1, length, dtype=np.int32)
    segment = Segment(
        ids=np.arange(length, dtype=np.int32),
        parent=-1,
        start=0,
        index=index,
        weight=np.ones(len(index), dtype=np.float32),
        message=np.full(len(index), -1, dtype=np.int32),
    )
    return Document((segment,), origin)


@pytest.fixture
def words(monkeypatch):
    def steps(*arguments, **options):
        yield []
        return render_words(*arguments, **options)

    monkeypatch.setattr(module, "render_steps", steps)


def texts(*rows, name="data.jsonl"):
    return Source(name, rows=[{"text": row} if isinstance(row, str) else row for row in rows])


@pytest.fixture(scope="module")
def template():
    return wrap_tokenizer(tiny_tokenizer())


def run(*sources, **options):
    return prepare(sources, FakeTemplate(), **{"max_length": 4, **options})


@pytest.mark.usefixtures("words")
def test_documents_keep_order_origin_and_count():
    prepared = run(texts("a b c", "d e"), texts("f g h i", name="other"))
    assert [str(one.origin) for one in prepared.documents] == [
        "data.jsonl:0",
        "data.jsonl:1",
        "other:0",
    ]
    assert prepared.formats == {"data.jsonl": "text", "other": "text"}
    assert prepared.sample_text == "w0 w1 w2"
    assert set(prepared.content_hashes) == {"data.jsonl", "other"}
    totals = prepared.ledger.totals
    assert (totals.tokens, totals.tokens_trained, totals.tokens_context) == (9, 6, 3)


@pytest.mark.usefixtures("words")
def test_all_bad_rows_are_counted_shown_and_listed(tmp_path):
    data = tmp_path / "data.jsonl"
    lines = ['{"text": "a b"}', '{"text": 3}', "{", *['{"text": ""}'] * 5, '{"text": "forbidden"}']
    data.write_text("\n".join(lines))
    listed = tmp_path / "run" / "bad_rows.jsonl"
    with pytest.raises(DataError) as caught:
        run(Source("data.jsonl", path=data), faults_file=listed)
    message = caught.value.message
    assert message.startswith("8 of 9 rows")
    for part in ("5 empty-text", "1 invalid-json", "1 wrong-type", "1 special-token", "line 3"):
        assert part in message
    assert all(f"data.jsonl:{row}:" in message for row in (1, 2, 3, 4, 5, 8))
    assert "data.jsonl:6:" not in message  # three of a kind are shown
    assert "data.bad_rows=drop" in caught.value.hint
    assert "too_long" not in caught.value.hint
    assert str(listed) in message
    rows = [json.loads(line)["row"] for line in listed.read_text().splitlines()]
    assert rows == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.usefixtures("words")
def test_dropped_bad_rows_are_in_the_ledger_with_their_reason():
    prepared = run(texts("a b", "", "forbidden", {"text": 1}), bad_rows="drop")
    assert len(prepared.documents) == 1
    reasons = prepared.ledger.reasons["data.jsonl"]
    assert {name: entry.rows for name, entry in reasons.items()} == {
        "empty-text": [1],
        "special-token": [2],
        "wrong-type": [3],
    }
    assert prepared.ledger.totals.rows_dropped == 3
    assert [fault.kind for _, fault in prepared.faults] == list(reasons)


@pytest.mark.usefixtures("words")
def test_over_long_rows_are_an_error_of_their_own():
    source = texts("a b", "a b c d e", "a b c d e f")
    with pytest.raises(DataError, match="2 of 3 rows") as caught:
        run(source, bad_rows="drop")
    assert "data.too_long=drop" in caught.value.hint
    assert "data.max_length" in caught.value.hint
    assert "bad_rows" not in caught.value.hint


@pytest.mark.parametrize(
    ("policy", "documents", "columns"),
    [("drop", 1, (0, 5, 0)), ("truncate", 2, (1, 0, 1))],
)
@pytest.mark.usefixtures("words")
def test_over_long_rows_are_accounted_for(policy, documents, columns):
    prepared = run(texts("a b", "a b c d e"), too_long=policy)
    totals = prepared.ledger.totals
    assert len(prepared.documents) == documents
    assert (totals.tokens_truncated, totals.tokens_dropped, totals.tokens_unused) == columns
    assert prepared.ledger.reasons["data.jsonl"]["over max_length"].rows == [1]


@pytest.mark.usefixtures("words")
def test_rows_of_another_format_are_faults():
    other = {"prompt": "p", "completion": "c"}
    with pytest.raises(DataError, match="1 mixed-format"):
        run(texts("a b", other))
    with pytest.raises(DataError, match="1 unknown-format"):
        run(texts({"other": 1}, "a b"))


@pytest.mark.usefixtures("words")
def test_without_any_known_column_the_columns_are_named():
    with pytest.raises(DataError, match="`question`, `answer`") as caught:
        run(texts({"question": "q", "answer": "a"}))
    assert "data.columns" in caught.value.hint


@pytest.mark.usefixtures("words")
def test_a_format_that_is_given_is_not_guessed():
    row = {"messages": [{"role": "user", "content": "m"}], "text": "a b"}
    prepared = run(Source("data.jsonl", rows=[row], format="text"))
    assert prepared.ledger.totals.tokens == 2


@pytest.mark.usefixtures("words")
def test_raw_prompts_where_there_is_no_template():
    template = FakeTemplate()
    template.has_chat_template = False
    row = {"prompt": "a b c", "completion": "d"}
    prepared = prepare([texts(row)], template, max_length=None)
    assert prepared.ledger.totals.tokens == 1


@pytest.mark.usefixtures("words")
def test_nothing_to_train_on_is_an_error():
    with pytest.raises(DataError, match="none of the 2 rows"):
        run(texts("a b c d e", ""), too_long="drop", bad_rows="drop")


@pytest.mark.usefixtures("words")
def test_held_out_rows_are_on_one_side_each():
    source = texts(*(f"row {n}" for n in range(20)))
    choice = holdout_split((row for row in source.rows), count=5)
    train = run(source, keep=lambda values: not choice.holds(values))
    held = run(source, keep=choice.holds)
    rows = {one.origin.row for one in train.documents}, {one.origin.row for one in held.documents}
    assert not rows[0] & rows[1]
    assert rows[0] | rows[1] == set(range(20))
    assert train.ledger.totals.rows_held_out == 5


@pytest.mark.usefixtures("words")
def test_rows_come_one_by_one_in_input_order():
    rows = iter_prepared([texts("a b", "", "c d")], FakeTemplate(), max_length=None)
    results = [(row.origin.row, row.values, row.result) for row in rows]
    assert [number for number, _, _ in results] == [0, 1, 2]
    assert isinstance(results[1][2], Fault)
    assert results[2][1] == {"text": "c d"}


def test_real_chats_add_up_and_end_in_their_stop_token(template):
    rows = chat_rows(6)
    unanswered = {"messages": [*rows[0]["messages"], {"role": "user", "content": "And then?"}]}
    empty = {"messages": [rows[0]["messages"][-2], {"role": "assistant", "content": ""}]}
    source = Source("data.jsonl", rows=[*rows, unanswered, empty])
    prepared = prepare([source], template, max_length=None, bad_rows="drop")
    assert len(prepared.documents) == 7
    totals = prepared.ledger.totals
    assert (totals.rows_trained, totals.rows_dropped, totals.rows_truncated) == (7, 1, 0)
    assert totals.tokens_unused > 0
    assert prepared.ledger.reasons["data.jsonl"][UNUSED].rows == [6]
    assert prepared.ledger.reasons["data.jsonl"]["empty-answer"].rows == [7]
    assert totals.tokens_trained == sum(one.target_tokens for one in prepared.documents)
    assert prepared.sample_text.endswith("<|im_end|>")
    assert rows[0]["messages"][-1]["content"] in prepared.sample_text


@pytest.mark.parametrize("policy", ["drop", "truncate", "split"])
def test_real_over_long_rows_add_up(template, policy):
    texts_of = [{"text": "The quick brown fox jumps. " * n} for n in (1, 4, 9)]
    source = Source("data.jsonl", rows=texts_of)
    whole = prepare([source], template, max_length=None).ledger.totals.tokens
    prepared = prepare([source], template, max_length=20, too_long=policy)
    assert prepared.ledger.totals.tokens == whole
    assert all(one.longest_path <= 20 for one in prepared.documents)
    lost = prepared.ledger.totals.tokens_truncated + prepared.ledger.totals.tokens_dropped
    assert (lost > 0) is (policy != "split")


def test_a_row_of_which_one_token_would_be_left_is_dropped():
    rows = Source("rows", rows=[{"input_ids": [3, 4]}, {"input_ids": [5]}])
    with pytest.raises(DataError, match="1 too-long"):
        prepare([rows], wrap_tokenizer(tiny_tokenizer()), max_length=1, too_long="truncate")


def test_half_of_a_character_is_a_fault_of_its_row():
    rows = [{"text": "whole 𝔘"}, {"text": "half \ud835"}]
    prepared = prepare(
        [Source("rows", rows=rows)], wrap_tokenizer(tiny_tokenizer()), max_length=None,
        bad_rows="drop",
    )  # fmt: skip
    assert len(prepared.documents) == 1
    ((origin, fault),) = prepared.faults
    assert (origin.row, fault.kind) == (1, "broken-text")
