"""The checks of fields that nothing reads, and of those that are read under another name."""

from __future__ import annotations

from tiny import tiny_tokenizer
from tunesmith.data.preprocess.prepare import iter_prepared
from tunesmith.data.row_errors import Fault
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.doctor.catalogue import run_check
from tunesmith.doctor.corpus import Case, Corpus, Setup

USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


def found(check: str, *rows: dict):
    template = wrap_tokenizer(tiny_tokenizer())
    cases = [
        Case(
            row.origin,
            None,
            fault=row.result if isinstance(row.result, Fault) else None,
            fields=row.all_fields,
        )
        for row in iter_prepared([Source("rows", rows=rows)], template, max_length=512)
    ]
    return run_check(check, Corpus(cases), Setup(template))


def test_other_columns_are_for_information_and_wishes_are_errors():
    plain = {"messages": [USER, ANSWER]}
    assert found("unread-fields", plain).level == "ok"
    said = found("unread-fields", plain, {**plain, "topic": "x"}, {**plain, "topic": "y"})
    assert (said.level, said.count, said.of) == ("info", 1, 3)
    assert "`topic`" in said.examples[0].text
    assert "(2 rows)" in said.examples[0].text
    assert said.hint == "data.ignore_fields=[topic]"
    refused = found("unread-fields", plain, {**plain, "functions": [{"name": "f"}]})
    assert refused.level == "error"
    assert refused.examples[0].where == "rows:1"
    assert refused.hint.startswith("data.columns={tools: functions}")


def test_other_spellings_are_said():
    said = found("renamed-fields", {"messages": [USER, {**ANSWER, "loss": True}]})
    assert said.level == "info"
    assert "`messages[].loss` is read as `train`" in said.examples[0].text
    assert found("other-faults", {"messages": [USER, {**ANSWER, "loss": True}]}).count == 0
