"""Every column, message field, content part and role that holds something is read, refused or
said.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny import CHATML, tiny_tokenizer, write_jsonl
from tunesmith.data.fields.misspelt import meant_by
from tunesmith.data.fields.normalize import Naming
from tunesmith.data.fields.table import COLUMNS, REFUSED
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.data.preprocess.prepare import prepare
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.errors import DataError

THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.thinking_blocks %}"
    "{{ '(' + m.thinking_blocks[0] + ')' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
ROWS = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "tokens": {"input_ids": [5, 6, 2]},
    "segments": {"segments": [{"text": "a", "train": False}, {"text": "b<|im_end|>", "train": True}]},  # noqa: E501
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "text": {"text": "a"},
}  # fmt: skip


def run(rows, template=CHATML, *, naming=None, **options):
    source = Source("rows", rows=rows, **({} if naming is None else {"naming": naming}))
    made = wrap_tokenizer(tiny_tokenizer(template))
    return prepare([source], made, max_length=512, **options)


def error(rows, template=CHATML, **options) -> str:
    with pytest.raises(DataError) as raised:
        run(rows, template, **options)
    return str(raised.value.message)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(ROWS)),
    st.sampled_from(sorted(REFUSED)) | st.sampled_from(["source", "id", "quality_score", "tags"]),
    st.sampled_from(["x", {"a": "x"}, ["x"], 0.5, False, None, "", [], {}, [None], {"a": None}]),
    st.sampled_from(["error", "drop"]),
)
def test_a_column_is_read_refused_or_said(form, name, value, bad_rows):
    if name in COLUMNS[form]:
        return
    empty = value in (None, "", [], {}, [None], {"a": None}) and value is not False
    rows = [ROWS[form], {**ROWS[form], name: value}]
    wish = name in REFUSED and not (form in ("text", "segments") and name in ("label", "labels"))
    if wish and not empty:
        said = error(rows, bad_rows=bad_rows)
        assert f"`{name}`" in said
        assert "in 1 row (rows:1)" in said
        assert f"data.ignore_fields=[{name}]" in said
    else:
        prepared = run(rows, bad_rows=bad_rows)
        assert len(prepared.documents) == 2
        assert any(f"`{name}`" in note for note in prepared.notes) is not empty
    ignored = run(rows, bad_rows=bad_rows, naming=Naming(ignore=(name,)))
    assert len(ignored.documents) == 2
    assert ignored.ledger.fields["rows"][name].state == "ignored"


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(REFUSED)) | st.sampled_from(["name", "id", "timestamp"]),
    st.sampled_from(["x", {"a": "x"}, ["x"], None, "", []]),
    st.sampled_from(["messages", "sharegpt"]),
)
def test_a_field_of_a_message_is_read_refused_or_said(name, value, form):
    if name in ("train", "weight", "tool_calls"):
        return
    row = json.loads(json.dumps(ROWS[form]))
    next(iter(row.values()))[1][name] = value
    place = next(iter(row))
    if value in (None, "", []):
        assert len(run([row]).documents) == 1
    elif name in REFUSED:
        assert name in error([row])
    else:
        assert any(f"`{place}[].{name}`" in note for note in run([row]).notes)


def test_the_template_itself_says_whether_it_reads_a_field():
    row = {"messages": [USER, {**ANSWER, "thinking_blocks": ["so"]}]}
    assert "thinking_blocks" in error([row])
    prepared = run([row], THINK)
    assert "(so)" in prepared.sample_text
    assert prepared.notes == []
    # Only the role whose text changes counts as read.
    told = {"messages": [USER, {**ANSWER, "mood": "glad"}]}
    assert any("`messages[].mood` (1 rows)" in note for note in run([told]).notes)


@pytest.mark.parametrize(
    ("field", "value", "targets"),
    [
        ("loss", False, [1]),
        ("training", False, [1]),
        ("loss_weight", 0, [1]),
        ("loss_scale", 0.0, [1]),
        ("loss", True, [0, 1]),
    ],
)
def test_other_trainers_wishes_are_read(field, value, targets):
    rows = [{"messages": [USER, {**ANSWER, field: value}, USER, ANSWER]}]
    prepared = run(rows)
    learned = {int(m) // 2 for s in prepared.documents[0].segments for m in set(s.message)}
    assert sorted(learned) == targets
    assert any(f"`messages[].{field}` as" in note for note in prepared.notes)


@pytest.mark.parametrize("field", ["trian", "wieght", "Train", "loss_weigth_", "mask", "label"])
def test_a_misspelt_wish_is_refused_even_where_bad_rows_are_dropped(field):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, field: 1.5}]}]
    if field == "loss_weigth_":
        assert any(field in note for note in run(rows).notes)
        return
    assert f"`messages[].{field}`" in error(rows, bad_rows="drop")


def test_wishes_on_content_parts_are_refused():
    part = {"type": "text", "text": "2", "train": False}
    rows = [{"messages": [USER, {"role": "assistant", "content": [part]}]}]
    assert "`messages[].content[].train`" in error(rows)
    assert len(run(rows, naming=Naming(ignore=("train",))).documents) == 1


NAMES = [("human", "gpt"), ("User", "Assistant"), ("user", "ai"), ("user", "model")]
CHATS = ["messages", "sharegpt", "prompt_completion", "preference", "alpaca"]


@pytest.mark.parametrize("names", NAMES)
def test_known_names_of_roles_are_mapped_and_said(names):
    rows = [{"messages": [{"role": names[0], "content": "a"}, {"role": names[1], "content": "b"}]}]
    prepared = run(rows)
    assert prepared.ledger.totals.rows_trained == 1
    assert any(f"role={names[1]}" in note for note in prepared.notes)
    assert "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb" in prepared.sample_text


@pytest.mark.parametrize(("role", "mend"), [("asistant", "assistant"), ("critic", "user")])
def test_an_unknown_role_is_refused_with_the_line_that_mends_it(role, mend):
    rows = [{"messages": [USER, {"role": role, "content": "b"}, USER, ANSWER]}] * 4
    said = error(rows, bad_rows="drop")
    assert f"data.roles={{{role}: {mend}}}" in said
    assert "4 rows (rows:0, rows:1, rows:2, ...)" in said
    assert len(run(rows, naming=Naming(roles={role: mend})).documents) == 4
    assert len(run(rows, naming=Naming(roles={role: role})).documents) == 4


@pytest.mark.parametrize("form", CHATS)
def test_a_system_column_is_the_system_turn_in_every_format(form):
    prepared = run([{**ROWS[form], "system": "Terse."}])
    assert prepared.sample_text.startswith("<|im_start|>system\nTerse.<|im_end|>")


def test_a_system_column_that_differs_from_the_system_turn_is_refused():
    turns = [{"role": "system", "content": "Long."}, USER, ANSWER]
    assert "two different system turns" in error([{"messages": turns, "system": "Terse."}])
    assert len(run([{"messages": turns, "system": "Long."}]).documents) == 1


def test_without_a_template_columns_of_a_chat_are_unread():
    assert "`system`" in error([{"prompt": "a", "completion": "b", "system": "c"}], None)


def test_a_function_call_of_the_old_api_is_a_tool_call():
    calls = "(message.tool_calls | tojson if message.tool_calls else message.content)"
    template = CHATML.replace("message['content']", calls)
    call = {"name": "find", "arguments": '{"at": "x"}'}
    turns = [USER, {"role": "assistant", "content": None, "function_call": call},
             {"role": "function", "name": "find", "content": "7"}, ANSWER]  # fmt: skip
    prepared = run([{"messages": turns}], template)
    assert '"arguments": {"at": "x"}' in prepared.sample_text
    assert "<|im_start|>tool\n7" in prepared.sample_text


def test_the_ledger_keeps_fields_and_merges_them(tmp_path):
    rows = [{**ROWS["text"], "topic": "x"} for _ in range(5)]
    ledger = run(rows).ledger
    ledger.save(tmp_path / "ledger.json")
    loaded = Ledger.load(tmp_path / "ledger.json")
    assert loaded.fields == ledger.fields
    loaded.merge(ledger)
    found = loaded.fields["rows"]["topic"]
    assert (found.rows, found.first) == (10, [0, 1, 2])


def test_worker_processes_count_the_same_fields(tmp_path):
    rows = [{**ROWS["messages"], "topic": "x", "n": number or None} for number in range(40)]
    source = Source("rows", path=write_jsonl(tmp_path / "rows.jsonl", rows))
    template = wrap_tokenizer(tiny_tokenizer())
    found = [
        prepare([source], template, max_length=512, processes=count).ledger.fields
        for count in (1, 2)
    ]
    assert found[0] == found[1]
    assert found[0]["rows"]["n"].rows == 39


def test_the_cache_keeps_what_is_said(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{**ROWS["messages"], "topic": "x"}])
    template = wrap_tokenizer(tiny_tokenizer())
    notes = [
        prepare([Source("rows", path=path)], template, max_length=512, cache=tmp_path / "c").notes
        for _ in range(2)
    ]
    assert notes[0][-1] == notes[1][-1]
    assert "`topic`" in notes[1][-1]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("trian", "train"), ("trin", "train"), ("traain", "train"), ("train", None), ("brain", None),
     ("Weight", "weight"), ("height", None), ("role", None), ("toolcalls", "tool_calls")],
)  # fmt: skip
def test_one_typing_error_is_a_misspelling(name, meant):
    assert meant_by(name, ("train", "weight", "tool_calls")) == meant
